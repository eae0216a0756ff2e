"""The comparison: each arm's mean over seeds, its difference from a baseline, and what was equal.

Owns which value of a run counts, and when a difference is outside the noise. Leaves how it looks to
text, page and tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moetrain.checks import ConfigError, nearest
from moetrain.compare.arms import (
    Arm,
    baseline_of,
    group,
    layout_differences,
    named,
    unequal_settings,
)
from moetrain.compare.finding import find_runs
from moetrain.compare.measuring import (
    END,
    EQUAL_WITHIN,
    Measured,
    Point,
    as_far_as_all,
    costs_of,
    measured_at,
    point_of,
)
from moetrain.compare.noise import CONFIDENCE, Difference, Estimate, estimate, holm, paired, welch
from moetrain.compare.run_results import (
    TRAINING_LOSS,
    VALIDATION_LOSS,
    RunResults,
    measure_pattern,
    read_results,
    with_known_texts,
)

OUTSIDE, WITHIN, UNKNOWN = "outside noise", "within noise", "one seed: noise unknown"
_BITS = "/bits_per_byte"
"""Where a source has it, its loss in nats says no more."""
EVALUATION = ("train.validation_sequences", "train.validation_weights", "train.seq_len")


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """An arm's values and their mean."""

    arm: Arm
    values: tuple[Measured, ...]
    estimate: Estimate
    counts: Mapping[str, float] = field(default_factory=dict)
    """What its runs cost up to there: means over them."""


@dataclass(frozen=True, kw_only=True)
class ArmDifference:
    """An arm against the baseline."""

    arm: Arm
    difference: Difference
    corrected_p: float | None
    """Corrected for the number of differences in its table, by Holm's rule."""
    source: str | None = None

    @property
    def verdict(self) -> str:
        """Whether it is outside the noise."""
        if self.corrected_p is None:
            return UNKNOWN
        return OUTSIDE if self.corrected_p < 1 - CONFIDENCE else WITHIN


@dataclass(frozen=True, kw_only=True)
class Table:
    """Arms by one measure."""

    measure: str
    source: str | None
    results: tuple[ArmResult, ...]
    differences: tuple[ArmDifference, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that a comparison knows."""

    measure: str
    point: Point
    axis: str
    main: Table
    sources: tuple[Table, ...]
    """The same by source."""
    baseline: Arm
    runs: tuple[RunResults, ...]
    """All that could be read, also those that are left out of the means."""
    left_out: tuple[str, ...]
    """A line for each run or folder that isn't in the means, and for damaged lines."""
    differing: Mapping[str, list[str]]
    layout: Mapping[str, list[str]]
    same_text: bool
    same_order: bool
    """Whether all arms read the same text in the same order, for a seed."""
    same_evaluation: bool

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms in the table's order."""
        return tuple(result.arm for result in self.main.results)

    @property
    def counts(self) -> dict[str, list[float]]:
        """Each count that all arms have, in their order."""
        results = self.main.results
        names = [n for n in results[0].counts if all(n in result.counts for result in results)]
        return {name: [result.counts[name] for result in results] for name in names}


def compare_runs(
    words: Sequence[str],
    *,
    measure: str | None = None,
    at: str = END,
    axis: str = "step",
    baseline: str | None = None,
    by: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Comparison:
    """Compares the runs that paths and patterns name.

    Raises ConfigError for runs that aren't there, an unknown metric, point, arm or setting, and
    where no run has what is asked for.
    """
    point = point_of(at, axis)
    found = find_runs(words)
    pattern = measure_pattern(measure or VALIDATION_LOSS)

    def keeps(name: str) -> bool:
        wanted = name in (measure, VALIDATION_LOSS, TRAINING_LOSS)
        return wanted or pattern.fullmatch(name) is not None

    left_out, runs = list(found.left_out), []
    for one in found.runs:
        try:
            runs.append(read_results(one, keeps=keeps))
        except ConfigError as error:
            left_out.append(f"{one.path.name}: {error.reason}")
        except OSError as error:
            left_out.append(f"{one.path.name}: can't be read: {error.strerror or error}")
    runs = with_known_texts(runs)
    left_out += [_damage(run) for run in runs if run.num_skipped]
    measure = _known_measure(measure, runs)
    arms, said = group(_usable(runs, measure, point, left_out))
    left_out += said
    if not arms:
        raise ConfigError("runs", ",".join(words), _nothing(left_out, runs, measure, point))
    arms = named(arms, by=by, names=names)
    if point.is_common:
        point = replace(point, value=as_far_as_all(arms, measure, point.axis))
    chosen = baseline_of(arms, baseline)
    metrics = {name for arm in arms for run in arm.runs for name in run.series}
    sources = sorted(name for name in metrics if pattern.fullmatch(name))
    sources = [s for s in sources if s.endswith(_BITS) or _bits_of(s) not in sources]
    main = _table(arms, measure, point, baseline=chosen, left_out=left_out)
    if not main.results:
        raise ConfigError("at", at, _nothing(left_out, runs, measure, point))
    used = [result.arm for result in main.results]
    if chosen not in used:
        chosen = used[0]
        main = _table(arms, measure, point, baseline=chosen, left_out=[])
    orders = {run.order for arm in used for run in arm.runs}
    return Comparison(
        measure=measure,
        point=point,
        axis=axis,
        main=main,
        sources=_by_source(used, sources, point, baseline=chosen),
        baseline=chosen,
        runs=tuple(sorted(runs, key=lambda run: (run.name, str(run.path)))),
        left_out=tuple(dict.fromkeys(left_out)),
        differing=dict(unequal_settings(arms)),
        layout=layout_differences([run for arm in used for run in arm.runs]),
        same_text=len({run.text for arm in used for run in arm.runs}) == 1,
        same_order=len(orders) == 1,
        same_evaluation=len({_evaluation(run) for arm in used for run in arm.runs}) == 1,
    )


def _known_measure(given: str | None, runs: Sequence[RunResults]) -> str:
    known = sorted({name for run in runs for name in run.last})
    if given is None:
        return VALIDATION_LOSS if VALIDATION_LOSS in known or not known else TRAINING_LOSS
    if known and given not in known:
        metrics = [name for name in known if "/" in name]
        some = f"; there are {', '.join(metrics)}"
        raise ConfigError(
            "measure", given, f"no run has such a metric{nearest(given, metrics) or some}"
        )
    return given


def _usable(
    runs: Sequence[RunResults], measure: str, point: Point, left_out: list[str]
) -> list[RunResults]:
    """Returns the runs that have a value to compare; says of the others why not."""
    found = []
    for run in runs:
        if point.is_end and not run.is_finished:
            left_out.append(f"{run.name}: {_state(run)}")
        elif measure not in run.last:
            left_out.append(f"{run.name}: has no {measure}")
        else:
            found.append(run)
    return found


def _state(run: RunResults) -> str:
    step, of = run.reached("step"), run.settings.get("train.num_steps")
    at = " before its first record"
    if step is not None:
        at = f" at step {step:.0f}" + (f" of {of}" if of else "")
    word = "running, or killed," if run.state == "running" else run.state
    return f"{word}{at}: left out of the means (at=common compares as far as all runs are)"


def _damage(run: RunResults) -> str:
    many = "1 line" if run.num_skipped == 1 else f"{run.num_skipped} lines"
    return f"{run.name}: {many} of its metrics.jsonl are damaged, and skipped"


def _nothing(
    left_out: Sequence[str], runs: Sequence[RunResults], measure: str, point: Point
) -> str:
    """Returns why nothing is left to compare, and what would be."""
    why = "; ".join(left_out) or "there is no run in it"
    if point.is_end and any(measure in run.last for run in runs):
        return f"no run has finished: {why}"
    return f"no run has a value to compare: {why}"


def _table(
    arms: Sequence[Arm],
    measure: str,
    point: Point,
    *,
    baseline: Arm,
    left_out: list[str],
    source: str | None = None,
) -> Table:
    results = []
    for arm in arms:
        values = []
        for run in arm.runs:
            measured = measured_at(run, measure, point)
            if isinstance(measured, str):
                left_out.append(f"{run.name}: {measured}")
            else:
                values.append(measured)
        if values:
            results.append(
                ArmResult(
                    arm=arm,
                    values=tuple(values),
                    estimate=estimate([one.value for one in values]),
                    counts=costs_of(values),
                )
            )
    base = next((result for result in results if result.arm is baseline), None)
    found = {
        result.arm.name: _difference(result, base)
        for result in results
        if base is not None and result is not base
    }
    corrected = holm({name: d.p for name, d in found.items() if d.p is not None})
    differences = tuple(
        ArmDifference(
            arm=result.arm,
            difference=found[result.arm.name],
            corrected_p=corrected.get(result.arm.name),
            source=source,
        )
        for result in results
        if result.arm.name in found
    )
    return Table(measure=measure, source=source, results=tuple(results), differences=differences)


def _difference(ours: ArmResult, baseline: ArmResult) -> Difference:
    """Pairs runs of one seed that read the same text, if one arm's seeds are all in the other."""
    left = {(one.run.seeds, one.run.order): one.value for one in ours.values}
    right = {(one.run.seeds, one.run.order): one.value for one in baseline.values}
    both = [key for key in left if key in right]
    if len(both) == min(len(left), len(right)):
        return paired([left[key] for key in both], [right[key] for key in both])
    return welch(list(left.values()), list(right.values()))


def _by_source(
    arms: Sequence[Arm], metrics: Sequence[str], point: Point, *, baseline: Arm
) -> tuple[Table, ...]:
    """Returns a table a source; their differences are corrected together."""
    tables = []
    for metric in metrics:
        source = metric.partition("/")[2].rpartition("/")[0]
        tables.append(_table(arms, metric, point, baseline=baseline, left_out=[], source=source))
    together = holm(
        {
            f"{number} {one.arm.name}": one.difference.p
            for number, table in enumerate(tables)
            for one in table.differences
            if one.difference.p is not None
        }
    )
    return tuple(
        replace(
            table,
            differences=tuple(
                replace(one, corrected_p=together.get(f"{number} {one.arm.name}"))
                for one in table.differences
            ),
        )
        for number, table in enumerate(tables)
    )


def is_equal(values: Sequence[float]) -> bool:
    """Returns whether counts are equal, to within 1%."""
    return max(values) <= min(values) * (1 + EQUAL_WITHIN)


def _bits_of(metric: str) -> str:
    return metric.rpartition("/")[0] + _BITS


def _evaluation(run: RunResults) -> tuple[object, ...]:
    return run.text, *(str(run.settings.get(name)) for name in EVALUATION)
