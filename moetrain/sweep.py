"""Sweeps: every combination of `-m model.num_experts=8,16` becomes a trial, a command of its own.

Owns that none begins before all are known to be right, and what each is to be trained with. Leaves
which run that is, running the trials and their table to `launch`.
"""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from data_pipeline import (
    DataError,
    DataSettings,
    open_or_build,
    resolved_dir,
    shards_or_corpus,
)
from data_pipeline.shell import as_typed, shell_command
from launch import (
    ClusterError,
    RayCluster,
    Trained,
    Trial,
    Wanted,
    assign,
    choose_plan,
    cluster_address,
    held,
    lasting,
    nearest_other,
    preview_table,
    rehearsal_of,
    run_sweep,
    runs_in,
    varied_settings,
)
from moetrain.checkpoint import CheckpointError, CheckpointSettings
from moetrain.checkpoint.remote import newest_manifest_there
from moetrain.checks import ConfigError
from moetrain.command import BAD_CONFIGURATION, DONE, FAILED, Combination
from moetrain.config import Config, check, resolve
from moetrain.train import as_plain
from moetrain.train.changes import changes

# What a trial waits at least for places: those of the one before it may not be free yet.
TRIAL_WAIT_SECONDS = 60.0


def sweep(combinations: list[Combination[Config]], folder: Path) -> int:
    """Trains every combination; returns the exit code. `folder` is for what the sweep leaves."""
    try:
        if any(combination.settings.dry_run for combination in combinations):
            _leave_nothing(folder)
            print(dry_sweep(combinations))
            return DONE
        with planned(combinations) as trials:
            return run_sweep(trials, folder=lasting(str(folder)), places=_places(combinations))
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
    combinations = _once_each(combinations)
    resolved = [_resolved(c.settings) for c in combinations]
    texts = {}
    for config, one in zip(resolved, combinations, strict=True):
        found = shards_or_corpus(one.settings.data)
        texts[str(config.data.dir)] = getattr(found, "fingerprint", None)
    wanted = _wanted(combinations, resolved, texts, base=f"{datetime.now():%Y%m%d-%H%M%S}")
    rows = []
    for trial, config, one in zip(
        _trials(combinations, resolved, wanted), resolved, combinations, strict=True
    ):
        named = replace(config, run=replace(config.run, name=trial.run_dir.name))
        rows.append((trial, rehearsal_of(named, data=one.settings.data).preview))
    return f"{preview_table(rows)}\ndry run: these could start; nothing was written"


def _leave_nothing(folder: Path) -> None:
    """Removes what Hydra has made for a sweep, and the folders that were made for it."""
    (folder / "multirun.yaml").unlink(missing_ok=True)
    with suppress(OSError):  # of a folder with other runs
        for empty in (folder, folder.parent, folder.parent.parent):
            empty.rmdir()


@contextmanager
def planned(combinations: Sequence[Combination[Config]]) -> Iterator[list[Trial]]:
    """Returns the trials of a sweep, whose names are its own while the context lasts.

    Raises ConfigError where one of them could not begin.
    """
    combinations = _once_each(combinations)
    resolved = [_resolved(c.settings) for c in combinations]
    texts = _texts([c.settings.data for c in combinations])
    given = [c.settings.run.name for c in combinations]
    folders = {Path(config.run.dir) for config in resolved}
    with ExitStack() as stack:
        base = stack.enter_context(_new_base(folders)) if None in given else ""
        names = {name or base for name in given}
        for folder in sorted(folders):
            stack.enter_context(held(folder / "sweeps", names))
        wanted = _wanted(combinations, resolved, texts, base=base)
        yield _trials(combinations, resolved, wanted)


def _wanted(
    combinations: Sequence[Combination[Config]],
    resolved: Sequence[Config],
    texts: Mapping[str, str | None],
    *,
    base: str,
) -> list[Wanted]:
    names = [c.settings.run.name or base for c in combinations]
    varied = _varied(combinations)
    return [
        Wanted(
            name=name,
            settings=as_plain(config),
            text=texts[str(config.data.dir)],
            varied=varied,
            may_be_bare=name != base,
            is_named=len(set(names)) > 1 or _holds_values(c),
        )
        for name, config, c in zip(names, resolved, combinations, strict=True)
    ]


def _once_each(combinations: Sequence[Combination[Config]]) -> list[Combination[Config]]:
    """Returns the combinations without those that have the settings of another one."""
    kept: list[Combination[Config]] = []
    for one in combinations:
        if any(one.settings == other.settings for other in kept):
            given = shell_command(one.overrides)
            print(f"moetrain: given twice, and trained once: {given}", file=sys.stderr)
        else:
            kept.append(one)
    return kept


def _resolved(config: Config) -> Config:
    check(config)
    plan = choose_plan(config.launch, device=config.run.device)
    if external := plan.external:
        raise ConfigError(
            "--multirun",
            "true",
            "this process is a rank that another launcher has started "
            f"({external.launcher.rank}, {external.launcher.world_size}), and a sweep starts runs: "
            "start it without that launcher, on a Ray cluster for several nodes",
        )
    return resolve(config, num_workers=plan.num_workers, now=datetime.now())


def _texts(settings: Sequence[DataSettings]) -> dict[str, str]:
    """Returns the fingerprint of each folder of shards.

    Builds those that are open to be built, which trials beside each other would all do.
    """
    folders = {str(resolved_dir(data)): data for data in settings}
    return {
        folder: open_or_build(data, progress=True).fingerprint for folder, data in folders.items()
    }


def _varied(combinations: Sequence[Combination[Config]]) -> set[str]:
    """Returns the settings in which the combinations differ."""
    first, *others = (as_plain(c.settings) for c in combinations)
    names = {change.name for other in others for change in changes(first, other)}
    return names - {"run.name", "run.dir"}


def _holds_values(combination: Combination[Config]) -> bool:
    names = [o for o in combination.overrides if o.lstrip("+").startswith("run.name=")]
    return any("${" in name for name in names)


@contextmanager
def _new_base(folders: Collection[Path]) -> Iterator[str]:
    """Returns a name by the time that nothing in some folders has, while the context lasts."""
    moment = datetime.now()
    while True:
        base = f"{moment:%Y%m%d-%H%M%S}"
        moment += timedelta(seconds=1)
        if any(path for folder in folders for path in folder.glob(f"{base}*")):
            continue
        with ExitStack() as stack:
            try:
                for folder in sorted(folders):
                    stack.enter_context(held(folder / "sweeps" / ".unnamed", {base}))
            except ConfigError:
                continue  # of a sweep that began in the same second
            yield base
            return


def _trials(
    combinations: Sequence[Combination[Config]],
    resolved: Sequence[Config],
    wanted: Sequence[Wanted],
) -> list[Trial]:
    names = _assigned(resolved, wanted)
    varied = varied_settings([combination.overrides for combination in combinations])
    return [
        Trial(
            number=number,
            varied=varied[number - 1],
            command=(
                *combination.flags,
                *combination.overrides,
                f"run.name={as_typed(name)}",
                f"run.dir={as_typed(config.run.dir)}",
                "launch.wait_for_nodes_seconds="
                f"{max(config.launch.wait_for_nodes_seconds, TRIAL_WAIT_SECONDS)}",
            ),
            run_dir=Path(config.run.dir, name),
            num_workers=config.launch.num_workers or 1,
            wanted=one,
        )
        for number, (combination, config, one, name) in enumerate(
            zip(combinations, resolved, wanted, names, strict=True), start=1
        )
    ]


def _assigned(resolved: Sequence[Config], wanted: Sequence[Wanted]) -> list[str]:
    """Returns the name of each trial's run; tells where one begins that a user may not expect."""
    names: dict[int, str] = {}
    for folder in dict.fromkeys(config.run.dir for config in resolved):
        here = [i for i, config in enumerate(resolved) if config.run.dir == folder]
        ours = [wanted[i] for i in here]
        uploads = {resolved[i].checkpoint.upload_to: resolved[i].checkpoint for i in here}
        runs = _runs(Path(folder), ours, [u for at, u in uploads.items() if at is not None])
        for i, name in zip(here, assign(ours, runs), strict=True):
            names[i] = name
            if told := nearest_other(name, wanted[i], runs):
                print(f"moetrain: {told}", file=sys.stderr)
    return [names[i] for i in range(len(resolved))]


def _runs(
    folder: Path, wanted: Sequence[Wanted], uploads: Sequence[CheckpointSettings]
) -> dict[str, Trained]:
    """Returns the runs of a sweep's names that are here, or where checkpoints are uploaded to."""

    def elsewhere(name: str) -> Trained | None:
        there = (newest_manifest_there(settings, run=name) for settings in uploads)
        return next((Trained.of(manifest) for manifest in there if manifest), None)

    return runs_in(
        folder,
        list(dict.fromkeys(one.name for one in wanted)),
        elsewhere=elsewhere if uploads else None,
        num_trials=len(wanted),
    )


def _places(combinations: list[Combination[Config]]) -> int | None:
    """Returns the number of ranks that there is room for at once; None without a cluster."""
    settings = combinations[0].settings.launch
    address = cluster_address(settings)
    if settings.mode == "inline" or not address:
        return None
    cluster = RayCluster.connect(address, allow_unauthenticated=settings.allow_unauthenticated)
    try:
        return cluster.fitting_workers()
    finally:
        cluster.disconnect()  # the trials have connections of their own
