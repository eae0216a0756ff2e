"""The settings of a sweep's trials, and the names that are reserved for them."""

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from data_pipeline import DataSettings, PlannedBuild, ShardFolder, open_or_build
from data_pipeline.commands.shell import as_typed, shell_command, unquoted
from launch.plan import choose_plan
from launch.sweeps.runs import (
    TrialSettings,
    assign,
    lock_names,
    nearest_other,
    runs_in,
)
from launch.sweeps.sweep import ExternalLauncher
from launch.sweeps.table import Trial
from moetrain.checkpoint.remote.of_run import newest_manifest_there
from moetrain.checkpoint.trained import TrainedSettings
from moetrain.checks import ConfigError
from moetrain.command import Combination
from moetrain.config import check, resolve
from moetrain.settings import CheckpointSettings, Config, Resolved
from moetrain.train.changes import as_plain, changes
from moetrain.train.prepare import on_shards
from moetrain.train.resume import require_no_restart

# The shortest time to wait for resources: those of the trial before may not be free yet.
TRIAL_WAIT_SECONDS = 60.0
_NAMES = {"run.name", "run.dir"}


class TrialPlan:
    """The settings of a sweep's trials, and the names that are reserved for them."""

    def __init__(self, held_names: ExitStack, *, in_batches: bool = False) -> None:
        self._held = held_names
        self._in_batches = in_batches
        self._base: str | None = None
        self._names: set[tuple[Path, str]] = set()
        self._first: Combination[Config] | None = None
        self._varied: set[str] = set()
        self._trials: list[Trial] = []

    def trials(
        self,
        combinations: Sequence[Combination[Config]],
        *,
        varied: Sequence[dict[str, str]],
        elsewhere: ExternalLauncher | None = None,
    ) -> list[Trial]:
        """Returns the trials of some combinations; ConfigError where one could not begin.

        `varied` are the values that each is called by.
        """
        resolved = [resolved_as_trial(c.settings, elsewhere) for c in combinations]
        resolved, texts = with_shards(resolved, combinations, find=open_or_build)
        self._hold(combinations, {Path(config.run.dir) for config in resolved})
        self._first = self._first or combinations[0]
        self._varied |= varied_names([self._first, *combinations])
        wanted = wanted_of(
            combinations, resolved, texts, base=self._base or "", differing=self._varied,
            varied=varied, in_batches=self._in_batches,
        )  # fmt: skip
        ours = {trial.run_dir: trial for trial in self._trials}
        found = trials_of(
            combinations, resolved, wanted, varied=varied, first=len(self._trials) + 1,
            taken=[trial.run_dir.name for trial in self._trials],
            threads=_threads(resolved, elsewhere),
        )  # fmt: skip
        # If a sweeper suggests the same values again, it is the same trial.
        found = [
            replace(t, number=ours[t.run_dir].number) if t.run_dir in ours else t for t in found
        ]
        self._trials += [trial for trial in found if trial.run_dir not in ours]
        return found

    def _hold(self, combinations: Sequence[Combination[Config]], folders: Collection[Path]) -> None:
        """Reserves the names of the combinations, against other sweeps."""
        given = [c.settings.run.name for c in combinations]
        if None in given and self._base is None:
            self._base = self._held.enter_context(_new_base(folders))
        names = [name or self._base or "" for name in given]
        for folder in sorted(folders):
            new = {name for name in names if (folder, name) not in self._names}
            self._held.enter_context(lock_names(folder / "sweeps", new))
            self._names |= {(folder, name) for name in new}


def wanted_of(
    combinations: Sequence[Combination[Config]],
    resolved: Sequence[Resolved],
    texts: Sequence[str | None],
    *,
    base: str,
    differing: Collection[str],
    varied: Sequence[Mapping[str, str]],
    in_batches: bool = False,
) -> list[TrialSettings]:
    """Returns each combination's settings for training; `base` names those without a name."""
    names = [c.settings.run.name or base for c in combinations]
    several = len(set(names)) > 1
    own = [_holds_values(c, values) for c, values in zip(combinations, varied, strict=True)]
    return [
        TrialSettings(
            name=name,
            settings=as_plain(config),
            text=text,
            varied=frozenset(differing),
            may_be_bare=holds_values or not (name == base or in_batches),
            is_named=not in_batches and (several or holds_values),
        )
        for name, config, text, holds_values in zip(names, resolved, texts, own, strict=True)
    ]


def once_each(combinations: Sequence[Combination[Config]]) -> list[Combination[Config]]:
    """Returns the combinations without duplicates."""
    kept: dict[str, Combination[Config]] = {}
    for one in combinations:
        if kept.setdefault(repr(one.settings), one) is not one:
            given = shell_command(one.overrides)
            print(f"moetrain: given twice, and trained once: {given}", file=sys.stderr)
    return list(kept.values())


def resolved_as_trial(config: Config, elsewhere: ExternalLauncher | None = None) -> Resolved:
    if elsewhere is not None and not elsewhere.num_at_once:
        return _resolved_there(config, elsewhere.num_workers)
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
    return resolve(
        config,
        num_workers=plan.num_workers,
        now=datetime.now(),
        gpus_per_node=plan.gpus_per_node,
    )


def _resolved_there(config: Config, num_workers: int | None) -> Resolved:
    """Returns a trial's settings on another machine, whose devices are unknown here."""
    model, run = config.model, config.run
    unknown = replace(
        config,
        model=replace(model, experts=replace(model.experts, backend="auto")),
        run=replace(run, device="auto"),
    )
    number = num_workers or config.launch.num_workers or 1
    found = resolve(unknown, num_workers=number, now=datetime.now())
    return replace(found, model=model, run=replace(found.run, device=run.device))


def _threads(resolved: Sequence[Resolved], elsewhere: ExternalLauncher | None) -> int | None:
    """Returns the threads of each rank where concurrent trials share this machine's cores."""
    at_once = min(elsewhere.num_at_once, len(resolved)) if elsewhere else 0
    if at_once < 2 or any(config.run.threads_per_rank for config in resolved):
        return None
    ranks = at_once * max(config.launch.num_workers for config in resolved)
    return max(1, (os.cpu_count() or 1) // ranks)


def with_shards(
    resolved: Sequence[Resolved],
    combinations: Sequence[Combination[Config]],
    *,
    find: Callable[[DataSettings], ShardFolder | PlannedBuild],
) -> tuple[list[Resolved], list[str | None]]:
    """Returns the configurations with the folders of their shards, and the shards' fingerprints.

    `find` is called once for each text: concurrent trials would all build what is missing. None is
    the fingerprint of shards that aren't built.
    """
    found: dict[tuple[str, ...], ShardFolder | PlannedBuild] = {}
    keys = [(c.data.dir, c.data.tokenizer, c.data.text_field) for c in resolved]
    for key, one in zip(keys, combinations, strict=True):
        found[key] = found.get(key) or find(one.settings.data)
    placed = [on_shards(config, found[key]) for key, config in zip(keys, resolved, strict=True)]
    return placed, [getattr(found[key], "fingerprint", None) for key in keys]


def varied_names(combinations: Sequence[Combination[Config]]) -> set[str]:
    """Returns the settings in which the combinations differ."""
    first, *others = (as_plain(c.settings) for c in combinations)
    names = {change.name for other in others for change in changes(first, other)}
    return names - _NAMES


def varied_before(one: Combination[Config]) -> dict[str, str]:
    """Returns the given values of an only trial in which other runs of its name differ.

    A sweep that is reduced to one value calls its trial as the larger one did.
    """
    name, plain = one.settings.run.name, as_plain(one.settings)
    runs = runs_in(Path(one.settings.run.dir), [name]) if name else {}
    found = {c.name for run in runs.values() for c in changes(run.settings, plain)}
    given = (o.lstrip("+").partition("=") for o in one.overrides)
    return {key: unquoted(value) for key, _, value in given if key in found - _NAMES}


def _holds_values(combination: Combination[Config], varied: Mapping[str, str]) -> bool:
    """Returns whether a trial's name is its own: given for it, or made of values."""
    names = [o for o in combination.overrides if o.lstrip("+").startswith("run.name=")]
    return "run.name" in varied or any("${" in name for name in names)


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
                    stack.enter_context(lock_names(folder / "sweeps" / ".unnamed", {base}))
            except ConfigError:
                continue  # of a sweep that began in the same second
            yield base
            return


def trials_of(
    combinations: Sequence[Combination[Config]],
    resolved: Sequence[Resolved],
    wanted: Sequence[TrialSettings],
    *,
    varied: Sequence[dict[str, str]],
    first: int = 1,
    taken: Collection[str] = (),
    threads: int | None = None,
) -> list[Trial]:
    names = _assigned(resolved, wanted, taken=taken)
    return [
        Trial(
            number=number,
            varied=varied[number - first],
            command=(
                *combination.flags,
                *combination.overrides,
                f"run.name={as_typed(name)}",
                f"run.dir={as_typed(config.run.dir)}",
                "launch.wait_for_nodes_seconds="
                f"{max(config.launch.wait_for_nodes_seconds, TRIAL_WAIT_SECONDS)}",
                *([f"run.threads_per_rank={threads}"] if threads else []),
            ),
            run_dir=Path(config.run.dir, name),
            num_workers=config.launch.num_workers,
            wanted=one,
        )
        for number, (combination, config, one, name) in enumerate(
            zip(combinations, resolved, wanted, names, strict=True), start=first
        )
    ]


def renamed(config: Resolved, name: str) -> Resolved:
    return replace(config, run=replace(config.run, name=name))


def _assigned(
    resolved: Sequence[Resolved], wanted: Sequence[TrialSettings], *, taken: Collection[str]
) -> list[str]:
    """Returns the name of each trial's run; reports where an unexpected one begins."""
    names: dict[int, str] = {}
    for folder in dict.fromkeys(config.run.dir for config in resolved):
        here = [i for i, config in enumerate(resolved) if config.run.dir == folder]
        ours = [wanted[i] for i in here]
        uploads = {resolved[i].checkpoint.upload_to: resolved[i].checkpoint for i in here}
        runs = _runs(Path(folder), ours, [u for at, u in uploads.items() if at is not None])
        for i, name in zip(here, assign(ours, runs, taken=taken), strict=True):
            names[i] = name
            if name not in runs:  # said before the first trial begins
                require_no_restart(renamed(resolved[i], name))
            if told := nearest_other(name, wanted[i], runs):
                print(f"moetrain: {told}", file=sys.stderr)
    return [names[i] for i in range(len(resolved))]


def _runs(
    folder: Path, wanted: Sequence[TrialSettings], uploads: Sequence[CheckpointSettings]
) -> dict[str, TrainedSettings]:
    """Returns the runs of a sweep's names that are here, or where checkpoints are uploaded to."""

    def elsewhere(name: str) -> TrainedSettings | None:
        there = (newest_manifest_there(settings, run=name) for settings in uploads)
        return next((TrainedSettings.of(manifest) for manifest in there if manifest), None)

    return runs_in(
        folder,
        list(dict.fromkeys(one.name for one in wanted)),
        elsewhere=elsewhere if uploads else None,
        num_trials=len(wanted),
    )
