"""A comparison as text: who differs in what, the means, and what is outside the noise.

Owns the words and columns. Leaves the figures to comparison.
"""

import math
import textwrap
from collections.abc import Iterator, Sequence

from data_pipeline.quantities import count, duration
from moetrain.compare.arms import COMMON, common_settings, seed_label
from moetrain.compare.comparison import (
    UNKNOWN,
    ArmDifference,
    ArmResult,
    Comparison,
    Table,
    is_equal,
)

MAX_NAME, MAX_LINE = 44, 100
MAX_LISTED = 12
_NOTHING = "–"
_LABEL = 10
UNITS = {"loss": "nats/token", "cross_entropy": "nats/token", "bits_per_byte": "bits/byte"}


def as_text(comparison: Comparison) -> str:
    """Returns the whole comparison for a terminal."""
    parts = ["\n".join(header(comparison)), _aligned(*means(comparison.main))]
    if comparison.main.differences:
        parts.append(f"{against(comparison)}\n{_aligned(*differences(comparison.main))}")
    if notes := "\n".join(_wrapped("note", note) for note in noise_notes(comparison)):
        parts.append(notes)
    for table in comparison.sources:
        parts.append(f"{unit_of(table.measure)} of {table.source}\n{_aligned(*joined(table))}")
    if comparison.counts:
        parts.append(f"counts\n{_aligned(*counts(comparison))}")
    return "\n\n".join(parts)


def header(comparison: Comparison) -> Iterator[str]:
    """Yields what was compared, in what the arms differ, and what is left out."""
    yield _wrapped("compared", compared(comparison))
    for label, lines in facts(comparison).items():
        for line in lines:
            yield _wrapped(label, line)


def compared(comparison: Comparison) -> str:
    """Returns what was compared, and where."""
    results = comparison.main.results
    runs, seeds = sum(len(result.values) for result in results), {len(r.values) for r in results}
    each = f", {_many(seeds.pop(), 'seed')} each" if len(seeds) == 1 else ""
    unit = unit_of(comparison.measure)
    return (
        f"{_many(runs, 'run')} in {_many(len(results), 'arm')}{each}: {comparison.measure}"
        f"{f' in {unit}' if unit != comparison.measure else ''}, {_where(comparison)}"
    )


def facts(comparison: Comparison) -> dict[str, list[str]]:
    """Returns what differs, what was equal, and what is left out: lines by their label."""
    differing = [f"{name} ({_some(v)})" for name, v in comparison.differing.items()]
    layout = [f"{name} ({', '.join(values)})" for name, values in comparison.layout.items()]
    common = common_settings(comparison.arms)
    equal = [name for name, values in comparison.counts.items() if is_equal(values)]
    unequal = [
        f"{name} ({count(min(values))} to {count(max(values))})"
        for name, values in comparison.counts.items()
        if not is_equal(values)
    ]
    for name, same in (
        ("text", comparison.same_text),
        ("order of the text for a seed", comparison.same_order),
        ("evaluation", comparison.same_evaluation),
    ):
        (equal if same else unequal).append(name)
    found = {"differ in": [", ".join(differing)] if differing else []}
    if any(arm.name == COMMON for arm in comparison.arms):
        named = ", ".join(f"{name}={value}" for name, value in common.items())
        found["common"] = [f"settings, of most arms: {named}"]
    if len(comparison.arms) > 1:
        found["equal"] = [f"{', '.join(equal)} (counts within 1%)"] if equal else []
        found["not equal"] = [", ".join(unequal)] if unequal else []
    found["warning"] = list(warnings(comparison))
    found["layouts"] = [f"differ, which only rounds otherwise: {', '.join(layout)}"]
    found["left out"] = [*comparison.left_out[:MAX_LISTED]]
    if (more := len(comparison.left_out) - MAX_LISTED) > 0:
        found["left out"].append(f"and {more} more")
    return {k: v for k, v in found.items() if v and (k != "layouts" or layout)}


def warnings(comparison: Comparison) -> Iterator[str]:
    """Yields why the arms' figures may not be compared as they stand."""
    if not comparison.same_text:
        yield (
            "the arms read other text, or have another tokenizer: losses in nats/token are of "
            "other tokens, and only bits per byte of the same held-out text can be compared"
        )
    elif not comparison.same_evaluation:
        yield "the arms are evaluated on other sequences of the held-out text"
    counts_of = comparison.counts
    for name in ("tokens", "steps"):
        if name in counts_of and not is_equal(counts_of[name]):
            least, most = min(counts_of[name]), max(counts_of[name])
            axis = "tokens" if name == "tokens" else "step"
            yield (
                f"arms were trained for different numbers of {name} ({count(least)} to "
                f"{count(most)}): at={axis}:{least:.0f} compares them where all have come"
            )
            return


def means(table: Table) -> tuple[list[str], list[list[str]]]:
    """Returns the table of arms: header and rows."""
    decimals = _decimals(table)
    header = ["arm", "seeds", "n", "mean", "± sd", "95% interval"]
    seeds = {r.arm.name: _seeds(r) for r in table.results}
    rows = [
        [
            result.arm.name,
            seeds[result.arm.name],
            str(result.estimate.n),
            f"{result.estimate.mean:.{decimals}f}",
            _NOTHING if (sd := result.estimate.deviation) is None else f"{sd:.{decimals}f}",
            _interval(result.estimate.low, result.estimate.high, decimals, signed=False),
        ]
        for result in table.results
    ]
    return header, rows


def differences(table: Table) -> tuple[list[str], list[list[str]]]:
    """Returns the table of differences from the baseline."""
    decimals = _decimals(table)
    header = ["arm", "difference", "95% interval", "by", "p", "verdict"]
    return header, [
        [one.arm.name, *_difference(one, decimals), one.verdict] for one in table.differences
    ]


def joined(table: Table) -> tuple[list[str], list[list[str]]]:
    """Returns one table of means and differences, for a source."""
    decimals = _decimals(table)
    by_arm = {one.arm.name: one for one in table.differences}
    header = ["arm", "mean", "± sd", "difference", "95% interval", "p", "verdict"]
    rows = []
    for result in table.results:
        one, sd = by_arm.get(result.arm.name), result.estimate.deviation
        told = _difference(one, decimals) if one else [_NOTHING] * 4
        rows.append(
            [
                result.arm.name,
                f"{result.estimate.mean:.{decimals}f}",
                _NOTHING if sd is None else f"{sd:.{decimals}f}",
                *told[:2],
                told[3],
                one.verdict if one else "baseline" if table.differences else _NOTHING,
            ]
        )
    return header, rows


def counts(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Returns the table of counts, and which of them were equal."""
    found = comparison.counts
    rows = [
        [result.arm.name, *(count(values[place]) for values in found.values())]
        for place, result in enumerate(comparison.main.results)
    ]
    if len(rows) > 1:
        rows.append(["equal", *("yes" if is_equal(v) else "no" for v in found.values())])
    return ["arm", *found], rows


def against(comparison: Comparison) -> str:
    """Returns the title of the differences."""
    return f"difference from {comparison.baseline.name}"


def noise_notes(comparison: Comparison) -> Iterator[str]:
    """Yields how the differences were judged, or what is missing to judge them."""
    told = comparison.main.differences
    single = [r.arm.name for r in comparison.main.results if r.estimate.n < 2]
    if single:
        which = "each arm has" if len(single) == len(comparison.arms) else f"{_some(single)} has"
        yield (
            f"{which} one seed, which tells nothing of the noise: train more with the same command "
            "and seed=0,1,2 (-m), which trains only what is missing"
        )
    pairs = [d for d in told if d.difference.method == "paired"]
    others = [d.arm.name for d in told if d.difference.method == "welch"]
    if pairs:
        yield (
            "paired: differences of runs with the same seed and text, whose common noise cancels"
            f"{f'; not so {_some(others)} (Welch)' if others else ''}"
        )
    elif others:
        yield "Welch's interval: the arms have no seeds and text in common"
    judged = [d for d in told if d.verdict != UNKNOWN]
    if judged:
        yield (
            f"p is corrected for {_many(len(judged), 'comparison')} (Holm); outside noise: p < "
            "0.05. An interval is of its difference alone"
        )


def unit_of(measure: str) -> str:
    """Returns the unit of a metric; its name where it has none."""
    return UNITS.get(measure.rpartition("/")[2], measure) if "/" in measure else measure


def _where(comparison: Comparison) -> str:
    point = comparison.point
    if point.value is None:
        return "at the end"
    far = duration(point.value) if point.axis == "time" else f"{count(point.value)}"
    place = {"step": f"step {point.value:.0f}", "tokens": f"{far} tokens", "flops": f"{far} FLOPs"}
    common = ", as far as all runs are" if point.is_common else ""
    steps = sorted({v.step for result in comparison.main.results for v in result.values})
    measured = (
        ""
        if point.axis == "step" and steps == [point.value]
        else f", measured at step {steps[0]:.0f}"
        + (f" to {steps[-1]:.0f}" if len(steps) > 1 else "")
    )
    return f"at {place.get(point.axis, f'{far} of training')}{common}{measured}"


def _difference(one: ArmDifference, decimals: int) -> list[str]:
    found = one.difference
    by = {"paired": _many(found.n, "pair"), "welch": "Welch"}.get(found.method, _NOTHING)
    return [
        f"{found.value:+.{decimals}f}",
        _interval(found.low, found.high, decimals, signed=True),
        by,
        _NOTHING if one.corrected_p is None else _probability(one.corrected_p),
    ]


def _probability(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _interval(low: float | None, high: float | None, decimals: int, *, signed: bool) -> str:
    if low is None or high is None:
        return _NOTHING
    sign = "+" if signed else ""
    return f"{low:{sign}.{decimals}f} to {high:{sign}.{decimals}f}"


def _decimals(table: Table) -> int:
    """Returns as many digits as the least noise leaves two of, and three for a loss."""
    noise = [r.estimate.deviation for r in table.results]
    noise += [d.value - d.low for one in table.differences if (d := one.difference).low is not None]
    told = [1 - math.floor(math.log10(width)) for width in noise if width]
    usual = 3 if max(abs(r.estimate.mean) for r in table.results) < 100 else 0
    return max(usual, min(6, max(told, default=0)))


def _seeds(result: ArmResult) -> str:
    return _some([seed_label(value.run) for value in result.values])


def _some(texts: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}{len(texts) - MAX_LISTED} more" if len(texts) > MAX_LISTED else ""
    return separator.join(texts[:MAX_LISTED]) + more


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _wrapped(label: str, text: str) -> str:
    return textwrap.fill(
        text,
        MAX_LINE,
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_on_hyphens=False,
    )


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns rows under their header; figures to the right, and a long name on several lines."""
    names = [textwrap.wrap(row[0], MAX_NAME, break_on_hyphens=False) or [""] for row in rows]
    lines = [[*header]]
    for row, (first, *rest) in zip(rows, names, strict=True):
        lines.append([first, *row[1:]])
        lines += [[f"  {more}", *([""] * (len(row) - 1))] for more in rest]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if _is_figure(header[place]) else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _is_figure(column: str) -> bool:
    return column not in ("arm", "seeds", "by", "verdict")
