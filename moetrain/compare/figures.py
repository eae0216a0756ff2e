"""The curves of a comparison: each arm's mean over its seeds, with a band of their spread.

Owns what a curve of several runs is. Leaves how figures look to moetrain.report.drawing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moetrain.compare.comparison import ArmResult, Comparison
from moetrain.compare.run_results import AXES, TRAINING_LOSS, RunResults
from moetrain.compare.text import unit_of
from moetrain.report.drawing import colours_of, number, on_page, scale_y, smoothed
from moetrain.report.run_record import Floats

MAX_PANELS = 8
_MAX_POINTS = 300
_NOISY = 30
"""Curves of more records are smoothed."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """An arm's mean along an axis."""

    x: Floats
    mean: Floats
    deviation: Floats
    """Of its runs; zeros for a single one."""


def curves_figure(comparison: Comparison, axis: str) -> str | None:
    """Returns the curves over an axis, as SVG; None where no run has them."""
    sources = [table.measure for table in comparison.sources]
    metrics = list(dict.fromkeys([comparison.measure, TRAINING_LOSS, *sources]))
    panels = []
    for metric in metrics[:MAX_PANELS]:
        curves = [curve(result, metric, axis) for result in comparison.main.results]
        if any(curves):
            panels.append((metric, curves))
    if not panels:
        return None
    colours = colours_of(len(comparison.arms))

    def figure() -> Figure:
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        fig = Figure(figsize=(9.6, 3.1 * rows), layout="constrained")
        axes = fig.subplots(rows, columns, squeeze=False)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for ax, (metric, curves) in zip(axes.flat, panels, strict=False):
            _draw(ax, curves, colours)
            # Names of sources are other people's, and `$` begins a formula.
            title = metric.encode(errors="backslashreplace").decode().replace("$", r"\$")
            ax.set_title(f"{title[:60]}, {unit_of(metric)}" if unit_of(metric) != metric else title)
            ax.set_xlabel(AXES[axis])
        return fig

    return on_page(figure, salt=axis)


def curve(result: ArmResult, metric: str, axis: str) -> Curve | None:
    """Returns an arm's mean and spread at the steps that all of its runs have come to.

    Runs that were recorded at other steps than the one with the fewest are interpolated.
    """
    runs = [value.run for value in result.values]
    if not all(_has(run, metric, axis) for run in runs):
        return None
    series = [run.series[metric] for run in runs]
    begin, end = max(s.steps[0] for s in series), min(s.steps[-1] for s in series)
    steps = min(series, key=lambda one: len(one.steps)).steps
    steps = steps[(steps >= begin) & (steps <= end)]
    if not len(steps):
        return None
    values = np.stack([np.interp(steps, s.steps, s.values) for s in series])
    along = [run.along(axis) for run in runs]
    x = np.mean([np.interp(steps, a.steps, a.values) for a in along], axis=0)
    mean = values.mean(axis=0)
    deviation = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros_like(mean)
    if len(steps) > _NOISY:
        mean, deviation = smoothed(mean), smoothed(deviation)
    kept = np.unique(np.linspace(0, len(steps) - 1, _MAX_POINTS).round().astype(int))
    return Curve(x=x[kept], mean=mean[kept], deviation=deviation[kept])


def _has(run: RunResults, metric: str, axis: str) -> bool:
    along = run.along(axis)
    return bool(run.series.get(metric)) and bool(along) and bool(np.isfinite(along.values).all())


def _draw(ax: Axes, curves: Sequence[Curve | None], colours: Sequence[str]) -> None:
    for one, colour in zip(curves, colours, strict=False):
        if one is None:
            continue
        marker = "o" if len(one.x) < 12 else None
        ax.fill_between(
            one.x, one.mean - one.deviation, one.mean + one.deviation,
            color=colour, alpha=0.18, linewidth=0,
        )  # fmt: skip
        ax.plot(one.x, one.mean, color=colour, marker=marker, markersize=3.5, linewidth=1.4)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(number))
    scale_y(ax, [one.mean for one in curves if one is not None])
