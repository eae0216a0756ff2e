"""What the driver does with a run folder, before its first rank and after its last."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from data_pipeline import DataSettings, ShardFolder
from data_pipeline.atomic_files import remove_leftovers, write_file
from launch.closing import closing_lines
from launch.folders import require_folder
from launch.run_lock import lock_run
from moetrain.checkpoint.folders import Save
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.remote.folder import require_mounted
from moetrain.checkpoint.remote.of_run import (
    fetch_newer,
    good_save,
    is_newer_there,
    take_over,
    upload_missing,
)
from moetrain.checkpoint.trained import newest_manifest
from moetrain.checks import ConfigError
from moetrain.exit_codes import DONE, STOPPED
from moetrain.kinds import EventKind
from moetrain.observe import EventLog, has_finished, read_events, read_sign
from moetrain.redaction import RedactingFormatter, redacted_arguments
from moetrain.settings import Resolved
from moetrain.train.changes import as_plain
from moetrain.train.control import Outcome
from moetrain.train.parameter_groups import parameter_groups
from moetrain.train.prepare import Prepared, prepare
from moetrain.train.resume import (
    is_complete,
    require_done_alike,
    require_same_model,
    what_is_complete,
)


def prepared_run(config: Resolved, data: DataSettings) -> Prepared:
    """Makes the checks that need no rank; raises ConfigError or DataError."""
    require_folder(config.run_dir)
    require_mounted(config.checkpoint)
    _fetch(config)
    prepared = prepare(config, data, progress=True)
    if newest := newest_manifest(config.run_dir):
        require_done_alike(config, newest)
    return prepared


def _fetch(config: Resolved) -> None:
    """Downloads an uploaded checkpoint, if it is newer than the run folder's."""
    if config.checkpoint.upload_to is None:
        return
    run_dir, name = config.run_dir, config.run.name
    directory = run_dir / "checkpoints"
    good = good_save(directory)
    if not is_newer_there(config.checkpoint, run=name, good=good):
        return
    if config.checkpoint.resume == "never":
        raise ConfigError(
            "checkpoint.resume",
            "never",
            f"run {name} has checkpoints in {config.checkpoint.upload_to}: use another run.name, "
            "or auto to resume from them",
        )

    def demand(manifest: Manifest) -> None:
        require_same_model(config, manifest)
        require_done_alike(config, manifest)

    with lock_run(run_dir):
        fetch_newer(
            config.checkpoint,
            run=name,
            directory=directory,
            good=good,
            demand=demand,
            event=EventLog(run_dir / "events.jsonl").write,
            say=lambda text: print(text, file=sys.stderr),
        )


def begin_attempt(config: Resolved) -> int:
    """Takes over a run from any other attempt; returns the number of the new attempt."""
    directory = config.run_dir / "checkpoints"
    return take_over(config.checkpoint, run=config.run.name, directory=directory)


def complete_save(config: Resolved) -> Save | None:
    """Returns a run's good checkpoint of its end; None without one, or without the run."""
    run_dir = config.run_dir
    newest = newest_manifest(run_dir)
    if newest is None or not is_complete(config, newest):
        return None  # without reading a checkpoint for it
    good = good_save(run_dir / "checkpoints")
    last = min(newest.step, config.train.num_steps)
    return good if good is not None and good.step >= last else None


def report_complete(
    config: Resolved, prepared: Prepared, good: Save, *, report: Callable[[Path], object]
) -> int:
    """Prints that a run is complete, and leaves its record alone unless it lacks an end."""
    run_dir = config.run_dir
    print(f"complete  run {config.run.name} {what_is_complete(config, step=good.step)}")
    outcome = Outcome(finished=True, step=good.step, last={})
    run_name, directory = config.run.name, run_dir / "checkpoints"
    if upload_missing(config.checkpoint, run=run_name, directory=directory, good=good):
        print(f"uploaded  its last checkpoint to {config.checkpoint.upload_to}")
    # Otherwise it was killed between its last checkpoint and its end.
    if not has_finished(read_events(run_dir / "events.jsonl")):
        _record_start(config, prepared)
        return close_run(config, outcome, prepared.shards, report)
    for line in closing_lines(config, outcome, prepared.shards, run_dir):
        print(line)
    return DONE


def open_run(config: Resolved, prepared: Prepared) -> Path:
    """Writes a run's configuration and start into its folder; returns the folder."""
    run_dir = config.run_dir
    text = yaml.safe_dump(as_plain(config), sort_keys=False)
    remove_leftovers(run_dir)
    write_file(run_dir / "config.yaml", text)
    _record_start(config, prepared)
    return run_dir


def _record_start(config: Resolved, prepared: Prepared) -> None:
    run_dir = config.run_dir
    event = EventLog(run_dir / "events.jsonl").write
    event(
        EventKind.start,
        command=" ".join(redacted_arguments(sys.argv)),
        workers=config.launch.num_workers,
        pid=os.getpid(),
        last_sign=read_sign(run_dir),  # after a kill, the only record of its end
    )
    groups = parameter_groups(config.model, config.optim)
    event(EventKind.model, **prepared.preview.counts(), parameter_groups=[vars(g) for g in groups])
    shards = prepared.shards
    for source, baselines in shards.baselines.items():
        plan = prepared.plan.get(source)
        event(
            EventKind.data,
            source=source,
            path=shards.location,
            baselines=vars(baselines),
            **(vars(plan) if plan else {"weights": {}}),
        )


def close_run(
    config: Resolved, outcome: Outcome, shards: ShardFolder, report: Callable[[Path], object]
) -> int:
    """Writes how the run ended, prints the closing lines and returns the exit code."""
    run_dir = config.run_dir
    event = EventLog(run_dir / "events.jsonl").write
    event(EventKind.finish if outcome.finished else EventKind.stop, step=outcome.step)
    try:
        report(run_dir)
    except Exception as error:  # a report that can't be drawn must not fail a run
        print(f"moetrain: no report: {error}", file=sys.stderr)
    for line in closing_lines(config, outcome, shards, run_dir):
        print(line)
    return DONE if outcome.finished else STOPPED


@contextmanager
def logging_to(run_dir: Path, *, rank: int) -> Iterator[None]:
    """Sends this process's log records to the rank's own file while the context lasts."""
    handler = logging.FileHandler(
        run_dir / "logs" / f"rank_{rank:03d}.log", errors="backslashreplace"
    )
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
