"""Sweeps: every combination of `-m model.num_experts=8,16` becomes a trial, a command of its own.

All are checked before any begins. Leaves each trial's settings to `trial_plan`, and running them
and their table to `launch`.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

import torch

from data_pipeline import DataError, opened_or_planned
from launch.dry_run import prepare_dry_run
from launch.failure import ClusterError
from launch.on_ray.cluster import RayCluster
from launch.plan import cluster_address, persistent_folder
from launch.sweeps.sweep import ExternalLauncher, Sweep, run_sweep
from launch.sweeps.table import Result, Trial, preview_table, varied_settings
from moetrain.checkpoint.manifest import CheckpointError
from moetrain.checks import ConfigError
from moetrain.command import Combination
from moetrain.compare.of_sweep import compare_sweep
from moetrain.exit_codes import BAD_CONFIGURATION, DONE, FAILED, STOPPED
from moetrain.settings import Config
from moetrain.sweeping.plugins import SweepEnded
from moetrain.sweeping.trial_plan import (
    TrialPlan,
    once_each,
    renamed,
    resolved_as_trial,
    trials_of,
    varied_before,
    varied_names,
    wanted_of,
    with_shards,
)


def sweep(combinations: list[Combination[Config]], folder: Path) -> int:
    """Trains every combination; returns the exit code. `folder` is for the sweep's own files."""
    try:
        if any(combination.settings.dry_run for combination in combinations):
            _leave_nothing(folder)
            print(dry_sweep(combinations))
            return DONE
        with planned(combinations) as trials:
            return run_sweep(
                trials,
                folder=persistent_folder(str(folder)),
                places=_places(combinations),
                compare=compare_sweep,
            )
    except (ConfigError, DataError) as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    except (ClusterError, CheckpointError, OSError) as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return FAILED


def dry_sweep(combinations: Sequence[Combination[Config]]) -> str:
    """Returns a table of what every combination would train; writes nothing.

    Raises ConfigError or DataError where one of them could not begin.
    """
    combinations = once_each(combinations)
    resolved = [resolved_as_trial(c.settings) for c in combinations]
    varied = varied_settings([c.overrides for c in combinations])
    if len(combinations) == 1:
        varied = [varied_before(combinations[0])]
    resolved, texts = with_shards(resolved, combinations, find=opened_or_planned)
    wanted = wanted_of(
        combinations,
        resolved,
        texts,
        base=f"{datetime.now():%Y%m%d-%H%M%S}",
        differing=varied_names(combinations),
        varied=varied,
    )
    rows = []
    trials = trials_of(combinations, resolved, wanted, varied=varied)
    for trial, config, one in zip(trials, resolved, combinations, strict=True):
        rows.append(
            (trial, prepare_dry_run(renamed(config, trial.run_dir.name), data=one.settings.data))
        )
    num_open = sum(not rehearsal.is_complete for _, rehearsal in rows)
    matches: dict[str, list[str]] = {}
    for trial, rehearsal in rows:
        if outcome := rehearsal.preview.match:
            matches.setdefault(outcome, []).append(str(trial.number))
    told = [f"match of trials {', '.join(numbers)}: {how}" for how, numbers in matches.items()]
    end = f"dry run: {num_open} of {len(rows)} could start; nothing was written"
    return "\n".join([preview_table(rows), *told, end])


def _leave_nothing(folder: Path) -> None:
    """Removes Hydra's files of a sweep, and the folders made for them."""
    (folder / "multirun.yaml").unlink(missing_ok=True)
    with suppress(OSError):  # of a folder with other runs
        for empty in (folder, folder.parent, folder.parent.parent):
            empty.rmdir()


@contextmanager
def planned(combinations: Sequence[Combination[Config]]) -> Iterator[list[Trial]]:
    """Returns the trials of a sweep, whose names are reserved while the context lasts.

    Raises ConfigError where one of them could not begin.
    """
    with ExitStack() as stack:
        once = once_each(combinations)
        varied = varied_settings([combination.overrides for combination in once])
        if len(once) == 1:
            varied = [varied_before(once[0])]
        yield TrialPlan(stack).trials(once, varied=varied)


class SweepInBatches:
    """A sweep by a third-party sweeper or launcher, which sees each trial as a job with a loss."""

    def __init__(self, folder: Path) -> None:
        self._folder = persistent_folder(str(folder))
        self._held = ExitStack()
        self._plan = TrialPlan(self._held, in_batches=True)
        self._sweep: Sweep | None = None

    def run(
        self,
        combinations: Sequence[Combination[Config]],
        *,
        varied: Sequence[dict[str, str]],
        elsewhere: ExternalLauncher | None,
    ) -> list[Result]:
        """Trains a batch, by a launcher if one is given; raises SweepEnded where that is all."""
        if self._sweep is not None and self._sweep.is_stopped:
            raise SweepEnded(STOPPED)
        try:
            _require_training(combinations)
            _require_room(combinations, elsewhere)
            once = once_each(combinations)
            labels = [varied[combinations.index(one)] for one in once]
            trials = self._plan.trials(once, varied=labels, elsewhere=elsewhere)
            if self._sweep is None:
                places = None if elsewhere else _places(combinations)
                self._sweep = Sweep(folder=self._folder, places=places, compare=compare_sweep)
        except (ConfigError, DataError) as error:
            print(f"moetrain: {error}", file=sys.stderr)
            raise SweepEnded(BAD_CONFIGURATION) from error
        except (ClusterError, CheckpointError, OSError) as error:
            print(f"moetrain: {error}", file=sys.stderr)
            raise SweepEnded(FAILED) from error
        run = self._sweep
        results = run.run_with_launcher(trials, elsewhere) if elsewhere else run.run(trials)
        if run.is_stopped:
            raise SweepEnded(STOPPED)
        settings = [one.settings for one in once]
        return [results[settings.index(one.settings)] for one in combinations]

    def close(self) -> int:
        """Prints the table of all trials and returns the exit code."""
        self._held.close()
        return self._sweep.close() if self._sweep is not None else DONE


def _require_training(combinations: Sequence[Combination[Config]]) -> None:
    if any(combination.settings.dry_run for combination in combinations):
        raise ConfigError(
            "dry_run",
            "true",
            "trains nothing that a sweeper could learn from, or a launcher start: leave out "
            "hydra/sweeper and hydra/launcher, with single values or lists of them",
        )


def _require_room(
    combinations: Sequence[Combination[Config]], elsewhere: ExternalLauncher | None
) -> None:
    """Raises ConfigError where concurrent trials would use the same devices."""
    if elsewhere is None or elsewhere.num_at_once < 2:
        return
    for one in combinations:
        if one.settings.run.device != "cpu" and torch.cuda.is_available():
            raise ConfigError(
                "hydra/launcher",
                "joblib",
                "each of the trials that it starts beside each other would take every GPU of this "
                "machine: leave it out, run ray start --head, and give launch.address=auto "
                "launch.num_workers=1, which gives each trial GPUs of its own; or "
                "hydra.launcher.n_jobs=1",
            )
        if cluster_address(one.settings.launch) and one.settings.launch.mode != "inline":
            raise ConfigError(
                "hydra/launcher",
                "joblib",
                "trials that it starts beside each other would wait for each other's places on "
                "the Ray cluster: leave it out, and as many run at once as there is room for",
            )


def _places(combinations: Sequence[Combination[Config]]) -> int | None:
    """Returns the number of ranks that fit at the same time; None without a cluster."""
    settings = combinations[0].settings.launch
    address = cluster_address(settings)
    if settings.mode == "inline" or not address:
        return None
    cluster = RayCluster.connect(address, allow_unauthenticated=settings.allow_unauthenticated)
    try:
        return cluster.fitting_workers()
    finally:
        cluster.disconnect()  # the trials have connections of their own
