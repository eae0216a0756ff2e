"""Matches trials with runs: a trial is the run that was trained with its settings.

A run's name is a number or made of values; neither says what was trained. Its newest checkpoint
does, and before the first one its `config.yaml`. Reads run folders, and leaves the meaning of
settings to `moetrain.train.changes`.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.locks import LockHeldError, owned
from moetrain.checkpoint.trained import TrainedSettings, trained
from moetrain.checks import ConfigError
from moetrain.train.changes import Change, Kind, changes, kind_of, leaves

_DECIDES = (Kind.function, Kind.order, Kind.recipe)
_NAMES = ("run.name", "run.dir")


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """The settings that a trial is to be trained with."""

    name: str
    """`run.name` as composed; several trials share it if it has none of their values."""
    settings: Mapping[str, Any]
    """Resolved, as nested dictionaries of JSON values."""
    text: str | None = None
    """The fingerprint of its shards; None if they aren't built yet."""
    varied: Collection[str] = ()
    """The settings in which the sweep's trials differ."""
    may_be_bare: bool = True
    """Whether the run may have the name without a number, if no other trial has it."""
    is_named: bool = False
    """Whether the name contains the trial's values, so that another run of it is an error."""


def differences(run: TrainedSettings, wanted: TrialSettings) -> list[Change]:
    """Returns the differences between a run and a trial; none: the run is the trial's.

    What a sweep varies must be equal, and everything that decides the result. Layout and the run's
    location may differ. Imported weights must only match the model.
    """
    found = []
    for change in changes(run.settings, wanted.settings):
        decides = change.kind in _DECIDES or change.name in wanted.varied
        if wanted.text is None:  # the folder's name, which is made of them, says which text
            decides |= change.name == "data.dir"
        if run.is_untrained:
            decides = change.kind is Kind.function
        if decides and change.name not in _NAMES:
            found.append(change)
    told = {change.name for change in found}
    ours = dict(leaves(wanted.settings))
    for name, value in run.earlier.items():
        decides = kind_of(name) in _DECIDES or name in wanted.varied
        if decides and name not in told and value != ours.get(name):
            change = Change(name=name, before=value, now=ours.get(name), kind=kind_of(name))
            found.append(change)
    if run.text and wanted.text and run.text != wanted.text:
        before, now = run.text[:12], wanted.text[:12]
        found.append(Change(name="data (its text)", before=before, now=now, kind=Kind.text))
    return found


def runs_in(
    folder: Path,
    names: Collection[str],
    *,
    elsewhere: Callable[[str], TrainedSettings | None] | None = None,
    num_trials: int = 0,
) -> dict[str, TrainedSettings]:
    """Returns the runs of some names, and of these names with a number: `lr`, `lr-1`, ….

    `elsewhere` returns the settings of a run that exists only in an upload; it is called for each
    name.
    """
    numbered = re.compile(f"(?:{'|'.join(map(re.escape, names))})(?:-[1-9]\\d*)?")
    try:
        entries = sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        entries = []
    found = {n: run for n in entries if numbered.fullmatch(n) and (run := trained(folder / n))}
    if elsewhere is None:
        return found
    for name in names:
        number = 0
        while number <= num_trials or _numbered(name, number - 1) in found:
            asked = _numbered(name, number)
            if asked not in found and (run := elsewhere(asked)):
                found[asked] = run
            number += 1
    return found


def assign(
    wanted: Sequence[TrialSettings],
    runs: Mapping[str, TrainedSettings],
    *,
    taken: Collection[str] = (),
) -> list[str]:
    """Returns each trial's run name: of the run that matches it, whatever its name, or a new one.

    If several runs match, the one with the fewest differences is chosen. `taken` are further names
    that no new run may have. Raises ConfigError for a name made of values that another run has.
    """
    uses = Counter(w.name for w in wanted)
    first = wanted[0].name
    pairs = []
    for index, one in enumerate(wanted):
        # Versions before named all after the first where two had one name.
        bases = [one.name, first] if max(uses.values()) > 1 else [one.name]
        for name, run in runs.items():
            base, number = _parts(name, bases)
            if base is not None and not differences(run, one):
                distance = len(changes(run.settings, one.settings))
                pairs.append((bases.index(base), distance, index, number, name))
    names: dict[int, str] = {}
    for _, _, index, _, name in sorted(pairs):
        if index not in names and name not in names.values():
            names[index] = name
    for index, one in enumerate(wanted):
        if index not in names:
            others = {*runs, *names.values(), *taken}
            names[index] = _new(one, taken=others, runs=runs, is_only=uses[one.name] == 1)
    return [names[index] for index in range(len(wanted))]


def nearest_other(name: str, one: TrialSettings, runs: Mapping[str, TrainedSettings]) -> str | None:
    """Returns how a run with a new trial's values differs from it, if there is one.

    A user who repeats a sweep with another shared setting should know why its trials start over.
    """
    if name in runs:
        return None
    told = [
        (len(found), other, found)
        for other, run in runs.items()
        if (found := differences(run, one)) and not {c.name for c in found} & set(one.varied)
    ]
    if not told:
        return None
    _, other, found = min(told, key=lambda entry: entry[:2])
    return f"{other} was trained with other settings ({listed(found)}): {name} is a new run"


def _new(
    one: TrialSettings,
    *,
    taken: Collection[str],
    runs: Mapping[str, TrainedSettings],
    is_only: bool,
) -> str:
    if one.may_be_bare and is_only and one.name not in taken:
        return one.name
    if one.is_named and is_only and one.name in runs:
        raise ConfigError(
            "run.name",
            one.name,
            f"there is a run of that name, with other settings than this trial's "
            f"({listed(differences(runs[one.name], one))}): use another run.name, or train that "
            "run on by itself, without -m",
        )
    numbers = iter(range(1, len(taken) + 2))
    return next(n for k in numbers if (n := _numbered(one.name, k)) not in taken)


def listed(found: Sequence[Change], *, most: int = 3) -> str:
    """Returns the first few of some differences for a message; an empty text without any."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(map(str, found[:most])) + more


def _numbered(name: str, number: int) -> str:
    return f"{name}-{number}" if number else name


def _parts(name: str, bases: Sequence[str]) -> tuple[str | None, int]:
    """Returns which of some names a run has, and its number; 0 without one."""
    for base in bases:
        if name == base:
            return base, 0
        if found := re.fullmatch(re.escape(base) + r"-([1-9]\d*)", name):
            return base, int(found[1])
    return None, 0


@contextmanager
def lock_names(folder: Path, names: Collection[str]) -> Iterator[None]:
    """Locks some names against other sweeps on this machine within the context.

    Two sweeps would give the same number to different trials. Raises ConfigError if another sweep
    has a name.
    """
    with ExitStack() as stack:
        for name in sorted(names):
            path = folder / f".{name}.lock"
            try:
                stack.enter_context(owned(path))
            except LockHeldError as error:
                raise ConfigError(
                    "run.name",
                    name,
                    f"process {error.owner} runs a sweep of this name: wait for it, or stop it, or "
                    "use another run.name",
                ) from None
            stack.callback(path.unlink, missing_ok=True)  # while it is held
        yield
