"""Arms: the runs that differ in their seeds alone, and what each arm is called.

Owns grouping, order and names, none of which depends on the order in which runs are given. Leaves
figures to comparison.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.commands.shell import unquoted
from moetrain.checks import ConfigError, nearest
from moetrain.compare.run_results import RunResults, is_seed
from moetrain.train.changes import Kind, as_typed_value, kind_of

COMMON = "common settings"
"""The name of an arm that differs in nothing from what most arms have."""
_TEXT = "data (its text)"
_FINGERPRINT = 12
_NO_NAME = ("run.name", "run.dir")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ in their seeds alone, each seed once."""

    name: str
    runs: tuple[RunResults, ...]
    settings: Mapping[str, str]
    """The settings in which the arms differ, as text."""


def group(runs: Sequence[RunResults]) -> tuple[list[Arm], list[str]]:
    """Returns the arms in the order of their settings, and what is said of runs that repeat others.

    Their names are left open: all are called by their settings in full.
    """
    runs = sorted(runs, key=lambda run: (run.name, str(run.path)))
    names = dict.fromkeys(name for run in runs for name in run.separating())
    grouped: dict[tuple[str, ...], dict[Any, RunResults]] = {}
    said = []
    for run in sorted(runs, key=_best_first):
        values = run.separating()
        arm = grouped.setdefault(tuple(_canonical(values.get(name)) for name in names), {})
        seeds = tuple((name, _canonical(value)) for name, value in run.seeds)
        if seeds in arm:
            said.append(f"{run.name}: repeats {arm[seeds].name}, with its settings and seed")
        else:
            arm[seeds] = run
    differing = [n for place, n in enumerate(names) if len({key[place] for key in grouped}) > 1]
    arms = []
    for own in grouped.values():
        members = tuple(sorted(own.values(), key=lambda run: _seed_order(run)))
        values = members[0].separating()
        arms.append(
            (
                [_order_of(values.get(name)) for name in differing],
                Arm(
                    name=" ".join(f"{n}={_shown(n, values.get(n))}" for n in differing),
                    runs=members,
                    settings={n: _shown(n, values.get(n)) for n in differing},
                ),
            )
        )
    return [arm for _, arm in sorted(arms, key=lambda entry: entry[0])], said


def named(arms: Sequence[Arm], *, by: Sequence[str] = (), names: Sequence[str] = ()) -> list[Arm]:
    """Returns the arms with short names.

    `names` are the user's, in the arms' order; `by` are the settings that name them. Without
    either, the arms of their file do (`arm`), the values that a sweep varied, or the settings in
    which an arm differs from most.
    Raises ConfigError where names or settings don't tell the arms apart.
    """
    if names:
        if len(names) != len(arms) or len(set(names)) != len(names):
            raise ConfigError(
                "names",
                f"[{','.join(names)}]",
                f"name each of the {len(arms)} arms once, in this order: "
                f"{'; '.join(arm.name for arm in named(arms))}",
            )
        return [replace(arm, name=name) for arm, name in zip(arms, names, strict=True)]
    if by:
        return _named_by(arms, by)
    if len(arms) == 1:
        return [replace(arms[0], name="all runs")]
    return _named_by_setting(arms) or _named_by_sweep(arms) or _named_by_deviation(arms)


def common_settings(arms: Sequence[Arm]) -> dict[str, str]:
    """Returns the values that more than half of the arms have, of settings in which some differ."""
    found = {}
    for name in arms[0].settings:
        value, times = Counter(arm.settings[name] for arm in arms).most_common(1)[0]
        if 2 * times > len(arms):
            found[name] = value
    return found


def baseline_of(arms: Sequence[Arm], given: str | None) -> Arm:
    """Returns the arm that others are compared with: the one that is given.

    Without one, it is the arm that the others were matched to (`match.to`), or else the first.
    An arm is given by its name, by settings (`model.num_experts=8,optim.lr=0.01`), or by the name
    of one of its runs. Raises ConfigError where that is no arm, or several.
    """
    if given is None:
        targets = {run.settings.get("match.to") for arm in arms for run in arm.runs} - {None}
        matched = [a for a in arms if targets == {r.settings.get("arm") for r in a.runs}]
        return matched[0] if len(matched) == 1 else arms[0]
    words = [word for word in given.replace(",", " ").split() if "=" in word]
    wanted = {key: unquoted(value) for key, _, value in (word.partition("=") for word in words)}
    found = [arm for arm in arms if arm.name == given]
    if not found:
        found = [a for a in arms if any(given in (r.name, str(r.path)) for r in a.runs)]
    if not found and wanted:
        found = [arm for arm in arms if all(_has(arm, k, v) for k, v in wanted.items())]
    if len(found) == 1:
        return found[0]
    names = [arm.name for arm in arms]
    why = f"{len(found)} arms have this" if found else f"is no arm{nearest(given, names)}"
    raise ConfigError("baseline", given, f"{why}; the arms are: {'; '.join(names)}")


def layout_differences(runs: Sequence[RunResults]) -> dict[str, list[str]]:
    """Returns the settings of the layout in which runs differ, with their values."""
    names = dict.fromkeys(n for run in runs for n in run.settings if kind_of(n) is Kind.layout)
    found = {n: sorted({_shown(n, run.settings.get(n)) for run in runs}) for n in names}
    return {name: values for name, values in found.items() if len(values) > 1}


def seed_label(run: RunResults) -> str:
    """Returns a run's seed, and further ones by name."""
    return ", ".join(
        as_typed_value(value) if name == "seed" else f"{name}={as_typed_value(value)}"
        for name, value in sorted(run.seeds, key=lambda entry: (entry[0] != "seed", entry[0]))
    )


def _named_by(arms: Sequence[Arm], by: Sequence[str]) -> list[Arm]:
    known = sorted({name for arm in arms for run in arm.runs for name in run.separating()})
    for name in by:
        if name not in known:
            raise ConfigError("by", name, f"there is no such setting{nearest(name, known)}")
    labels = [
        " ".join(f"{n}={_shown(n, arm.runs[0].separating().get(n))}" for n in by) for arm in arms
    ]
    if len(set(labels)) < len(arms):
        rest = [name for name in arms[0].settings if name not in by]
        raise ConfigError(
            "by",
            f"[{','.join(by)}]",
            f"doesn't tell the {len(arms)} arms apart: add {' or '.join(rest)}",
        )
    return [replace(arm, name=label) for arm, label in zip(arms, labels, strict=True)]


def _named_by_setting(arms: Sequence[Arm]) -> list[Arm] | None:
    """Returns the arms under the names of their configurations' `arm`, if these tell them apart."""
    labels = [{run.settings.get("arm") for run in arm.runs} for arm in arms]
    names = [label.pop() for label in labels if len(label) == 1]
    if None in names or len(set(names)) < len(arms):
        return None
    return [replace(arm, name=str(name)) for arm, name in zip(arms, names, strict=True)]


def _named_by_sweep(arms: Sequence[Arm]) -> list[Arm] | None:
    """Returns the arms under the values that their sweep varied, if these tell them apart."""
    labels = []
    for arm in arms:
        told = {_varied(run) for run in arm.runs}
        if len(told) != 1 or None in told:
            return None
        labels.append(dict(told.pop() or ()))
    keys = [k for k in dict.fromkeys(k for one in labels for k in one) if _differs(k, labels)]
    short = _short(keys)
    found = [" ".join(f"{short[k]}={one[k]}" for k in keys if k in one) for one in labels]
    if len(set(found)) < len(arms) or not all(found):
        return None
    return [replace(arm, name=name) for arm, name in zip(arms, found, strict=True)]


def _named_by_deviation(arms: Sequence[Arm]) -> list[Arm]:
    common = common_settings(arms)
    short = _short(list(arms[0].settings))
    return [
        replace(
            arm,
            name=" ".join(f"{short[n]}={v}" for n, v in arm.settings.items() if common.get(n) != v)
            or COMMON,
        )
        for arm in arms
    ]


def _varied(run: RunResults) -> tuple[tuple[str, str], ...] | None:
    if run.varied is None:
        return None
    return tuple((k, v) for k, v in run.varied.items() if not is_seed(k) and k not in _NO_NAME)


def _differs(key: str, labels: Sequence[Mapping[str, str]]) -> bool:
    return len({one.get(key) for one in labels}) > 1


def _short(names: Sequence[str]) -> dict[str, str]:
    """Returns the last part of each name, or all of it where another ends alike."""
    lasts = Counter(name.rpartition(".")[2] for name in names)
    return {n: last if lasts[last := n.rpartition(".")[2]] == 1 else n for n in names}


def _has(arm: Arm, name: str, value: str) -> bool:
    known = _short(list(arm.settings)) | {name: name for name in arm.settings}
    full = next((n for n in arm.settings if name in (n, known[n])), name)
    own = arm.runs[0].separating().get(full)
    return full in arm.runs[0].separating() and _canonical(_read(value)) == _canonical(own)


def _read(text: str) -> Any:
    """Returns a typed value: a number where it reads as one."""
    words = {"null": None, "true": True, "false": False}
    try:
        return words[text] if text in words else float(text)
    except ValueError:
        return text


def _canonical(value: Any) -> str:
    """Returns a text that is the same for equal values: 1 and 1.0 are."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return as_typed_value(value)


def _shown(name: str, value: Any) -> str:
    if name == _TEXT and " " not in str(value):
        return str(value)[:_FINGERPRINT]
    return value if isinstance(value, str) else as_typed_value(value)


def _order_of(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 1, float(value), ""
    return (0, 0.0, "") if value is None else (2, 0.0, str(value))


def _seed_order(run: RunResults) -> list[tuple[int, float, str]]:
    return [_order_of(value) for _, value in run.seeds]


def _best_first(run: RunResults) -> tuple[bool, float, str, str]:
    return not run.is_finished, -(run.reached("step") or 0), run.name, str(run.path)


def unequal_settings(arms: Sequence[Arm]) -> Iterator[tuple[str, list[str]]]:
    """Yields each setting in which arms differ, with its values in the arms' order."""
    for name in arms[0].settings:
        yield name, list(dict.fromkeys(arm.settings[name] for arm in arms))
