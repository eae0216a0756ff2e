"""The figures of a report: the only file that imports matplotlib.

Owns the look of curves: one palette, quiet axes, colours that work on a light and on a dark page.
Each function takes a run and returns SVG text, or None if there is nothing to draw. Leaves the page
to page.py.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from data_pipeline.quantities import count
from moetrain.report.run_record import ExpertLoads, Floats, RunRecord, Series, read_run

BLUE, ORANGE, GREEN, RED, PURPLE = "#4285d4", "#e8833a", "#35a07a", "#d9566a", "#8f74d8"
TEAL, PINK, OLIVE = "#22a3b8", "#d873ac", "#a89432"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, PINK, OLIVE)

# Colours of no curve: they become the page's own text and line colours.
_INK, _FAINT, _GRID = "#343b48", "#5f6877", "#d9dde3"
_PAGE_COLOURS = {_INK: "currentColor", _FAINT: "var(--faint)", _GRID: "var(--line)"}

# Underloaded experts are blue, a fair share is pale, overloaded ones are orange.
_LOAD_COLOURS = LinearSegmentedColormap.from_list("load", [BLUE, "#c9dcf3", "#f6f4ef", ORANGE, RED])

MAX_CURVE_LAYERS, MAX_CURVE_EXPERTS = 8, 16
MAX_POINTS = 700

# Any, since what matplotlib's stubs call these names differs from release to release.
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _FAINT,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "font.family": "sans-serif",
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": _FAINT,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "moetrain",  # the same run draws the same bytes
    "xtick.color": _GRID,
    "xtick.labelcolor": _FAINT,
    "xtick.labelsize": 9,
    "ytick.color": _GRID,
    "ytick.labelcolor": _FAINT,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
}


def loss_figure(run: RunRecord) -> str | None:
    """Training and validation loss over the steps."""
    if not (_training_loss(run) or run.get("validation/loss")):
        return None
    return _on_page(lambda: _single(lambda ax: _draw_loss(ax, run), width=9.6, height=3.4))


def optimisation_figure(run: RunRecord) -> str | None:
    """Learning rate and gradient norm, side by side."""
    return _panels(
        [
            ("Learning rate", run.get("optim/lr"), BLUE, False),
            ("Gradient norm", run.get("optim/grad_norm"), PURPLE, True),
        ]
    )


def throughput_figure(run: RunRecord) -> str | None:
    """Tokens a second, and the seconds that a step waited for data."""
    return _panels(
        [
            ("Tokens per second", run.get("perf/tokens_per_second"), GREEN, False),
            ("Model FLOPs utilisation", run.get("perf/model_flops_utilization"), TEAL, False),
            ("Wait for data, seconds a step", run.get("perf/data_wait_seconds"), OLIVE, False),
        ]
    )


def balance_figure(run: RunRecord) -> str | None:
    """Max violation of the worst layer, and the router's entropy."""
    return _panels(
        [
            ("Max violation, worst layer", run.get("router/max_violation"), ORANGE, False),
            ("Router entropy", run.get("router/entropy"), PURPLE, False),
            ("Dead experts", run.get("router/dead_experts"), RED, False),
        ]
    )


def expert_load_figure(run: RunRecord) -> str | None:
    """One small picture a layer: a curve for each expert, or a heat map where there are many."""
    loads = run.expert_loads
    if loads is None:
        return None
    as_map = shows_load_map(loads)
    draw = _draw_load_map if as_map else _draw_load_curves
    columns = min(4, len(loads.layers))
    rows = math.ceil(len(loads.layers) / columns)

    def figure() -> Figure:
        height = 1.25 if as_map else 1.75
        fig = Figure(figsize=(9.6, height * rows + 0.75), layout="constrained")
        axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for index, ax in enumerate(axes.flat):
            if index < len(loads.layers):
                draw(ax, loads, index)
                ax.set_title(f"layer {loads.layers[index]}", fontweight="normal", fontsize=9.5)
            else:
                ax.set_axis_off()
        fig.supxlabel("step", fontsize=9, color=_FAINT)
        fig.supylabel("expert" if as_map else "share of tokens", fontsize=9, color=_FAINT)
        if as_map:
            _colour_scale(fig, axes, loads)
        return fig

    return _on_page(figure)


def shows_load_map(loads: ExpertLoads) -> bool:
    """Whether the loads are drawn as heat maps: too many experts or layers, or too little time."""
    few = len(loads.layers) <= MAX_CURVE_LAYERS and loads.num_experts <= MAX_CURVE_EXPERTS
    return not few or len(loads.steps) < 2


def figure_for_readme(run_dir: Path | str, *, to: Path | str) -> Path:
    """Write one wide picture, loss beside expert load, as SVG or PNG by the name's ending."""
    run, to = read_run(Path(run_dir)), Path(to)
    style = {**_STYLE, "svg.fonttype": "path"}  # an image in a README can't rely on fonts
    with matplotlib.rc_context(style):
        room = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        fig = Figure(figsize=(12, 4.2), layout=room, facecolor="white")
        halves: Any = fig.subfigures(1, 2, width_ratios=(1, 1.1), wspace=0.04)
        left, right = halves
        loss = left.subplots()
        _draw_loss(loss, run)
        loss.set_title("Loss")
        loads = run.expert_loads
        if loads is None:
            right.text(0.5, 0.5, "no expert load logged", ha="center", color=_FAINT)
        else:
            _draw_readme_loads(right, loads)
        fig.savefig(to, dpi=160, metadata=_no_metadata(to.suffix))
    return to


def _draw_readme_loads(figure: Any, loads: ExpertLoads) -> None:
    chosen = np.unique(np.linspace(0, len(loads.layers) - 1, 4).round().astype(int))
    columns = min(2, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    few = loads.num_experts <= MAX_CURVE_EXPERTS and len(loads.steps) > 1
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for index, ax in zip(chosen, axes.flat, strict=False):
        (_draw_load_curves if few else _draw_load_map)(ax, loads, int(index))
        ax.set_title(f"Expert load, layer {loads.layers[int(index)]}")
    for ax in axes.flat[len(chosen) :]:
        ax.set_axis_off()
    for ax in axes[-1]:
        ax.set_xlabel("step")
    if few:
        axes[0, 0].legend(loc="upper right")
    else:
        axes[0, 0].set_ylabel("expert")
        _colour_scale(figure, axes, loads)


def _draw_loss(ax: Axes, run: RunRecord) -> None:
    training, validation = _training_loss(run), run.get("validation/loss")
    if training:
        _draw_noisy(ax, training, BLUE, label="training")
    if validation:
        marker = "o" if len(validation.steps) <= 40 else None
        ax.plot(
            validation.steps,
            validation.values,
            color=ORANGE,
            marker=marker,
            markersize=4,
            label="validation",
        )
    ax.set_xlabel("step")
    ax.set_ylabel("cross-entropy, nats/token")
    _scale_y(ax, [s.values for s in (training, validation) if s])
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper right")


def _draw_load_curves(ax: Axes, loads: ExpertLoads, layer: int) -> None:
    colours = _expert_colours(loads.num_experts)
    for expert in range(loads.num_experts):
        line = loads.loads[:, layer, expert]
        ax.plot(loads.steps, line, color=colours[expert], linewidth=1.2, alpha=0.9)
    fair = 1 / loads.num_experts
    ax.axhline(fair, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="fair share")
    # The same scale for all layers, so that a crowded one stands out; a collapse needs it whole.
    top = float(np.nanmax(loads.loads, initial=fair))
    ax.set_ylim(0, min(1.02, max(2 * fair, 1.1 * top)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    _scale_steps(ax, loads.steps, num_ticks=3)


def _draw_load_map(ax: Axes, loads: ExpertLoads, layer: int) -> None:
    ax.imshow(
        loads.loads[:, layer].T * loads.num_experts,
        aspect="auto",
        cmap=_LOAD_COLOURS,
        extent=(*_step_span(loads.steps), loads.num_experts - 0.5, -0.5),
        interpolation="nearest",
        vmin=0,
        vmax=2,
    )
    ax.grid(visible=False)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _scale_steps(ax, loads.steps, num_ticks=3)


def _colour_scale(figure: Any, axes: Any, loads: ExpertLoads) -> None:
    image = axes.flat[0].images[0]
    shrink = min(0.7, 2 / len(axes))  # as tall as two rows of layers
    scale = figure.colorbar(image, ax=axes, shrink=shrink, aspect=22, pad=0.015, ticks=[0, 1, 2])
    scale.outline.set_visible(False)
    scale.ax.set_yticklabels(["none", f"fair: 1/{loads.num_experts}", "twice or more"])
    scale.ax.tick_params(length=0)


def _expert_colours(count: int) -> Sequence[str]:
    if count <= len(PALETTE):
        return PALETTE
    around = LinearSegmentedColormap.from_list("experts", PALETTE)
    return [to_hex(around(index / (count - 1))) for index in range(count)]


def _panels(panels: Sequence[tuple[str, Series, str, bool]]) -> str | None:
    """Panels side by side for the series that were logged; the last field asks for a log scale."""
    there = [panel for panel in panels if panel[1]]
    if not there:
        return None

    def figure() -> Figure:
        fig = Figure(figsize=(9.6, 2.6), layout="constrained")
        axes = fig.subplots(1, len(there), squeeze=False)
        for ax, (title, series, colour, logarithmic) in zip(axes.flat, there, strict=True):
            _draw_noisy(ax, series, colour)
            if logarithmic:
                _scale_y(ax, [series.values])
            else:
                lowest, highest = float(series.values.min()), float(series.values.max())
                ax.set_ylim(min(0.0, lowest), 1.08 * highest if highest > 0 else 1.0)
                ax.yaxis.set_major_locator(MaxNLocator(5))
                ax.yaxis.set_major_formatter(FuncFormatter(_number))
            ax.set_title(title)
            ax.set_xlabel("step")
        return fig

    return _on_page(figure)


def _single(draw: Callable[[Axes], None], *, width: float, height: float) -> Figure:
    fig = Figure(figsize=(width, height), layout="constrained")
    draw(fig.subplots())
    return fig


def _draw_noisy(ax: Axes, series: Series, colour: str, *, label: str | None = None) -> None:
    """A faint line of all values with a smooth one over it; a lone record is a dot."""
    steps, values = thinned(series)
    _scale_steps(ax, steps, num_ticks=5)
    if len(steps) < 2:
        ax.plot(steps, values, "o", color=colour, label=label)
        return
    if len(steps) < 30:
        ax.plot(steps, values, color=colour, label=label)
    else:
        ax.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
        ax.plot(steps, _smoothed(values), color=colour, label=label)


def thinned(series: Series) -> tuple[Floats, Floats]:
    """The lowest and the highest of each stretch, so that no spike is lost by drawing less."""
    count = len(series.steps)
    if count <= MAX_POINTS:
        return series.steps, series.values
    edges = np.linspace(0, count, MAX_POINTS // 2 + 1).astype(int)
    kept = {0, count - 1}
    for start, stop in pairwise(edges):
        stretch = series.values[start:stop]
        kept |= {start + int(stretch.argmin()), start + int(stretch.argmax())}
    index = np.array(sorted(kept))
    return series.steps[index], series.values[index]


def _smoothed(values: Floats) -> Floats:
    """A centred mean over a fortieth of the curve, narrower at its ends, so that it never lags."""
    half = max(1, len(values) // 80)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    return np.asarray((total[place + reach + 1] - total[place - reach]) / (2 * reach + 1))


def _scale_y(ax: Axes, curves: Sequence[Floats]) -> None:
    """A logarithmic axis with plain numbers where the values span more than a factor of 2.5."""
    ax.yaxis.set_major_formatter(FuncFormatter(_number))
    values = np.concatenate(curves) if curves else np.empty(0)
    if len(values) and values.min() > 0 and values.max() / values.min() > 2.5:
        ax.set_yscale("log")
        decades = math.log10(values.max() / values.min())
        subs = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(FuncFormatter(_number))


def _number(value: float, _position: int | None = None) -> str:
    return count(value)


def _step_span(steps: Floats) -> tuple[float, float]:
    first, last = float(steps[0]), float(steps[-1])
    return (first, last) if last > first else (first - 1, first + 1)


def _scale_steps(ax: Axes, steps: Floats, *, num_ticks: int) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(num_ticks, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(_number))
    if len(steps) < 2:
        ax.set_xlim(*_step_span(steps))


def _training_loss(run: RunRecord) -> Series:
    return run.get("train/cross_entropy") or run.get("train/loss")


def _on_page(make: Callable[[], Figure]) -> str:
    """SVG to stand in an HTML page: its texts are texts, its ink is the page's."""
    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.fonttype": "none"}):
        make().savefig(file, format="svg", transparent=True, metadata=_no_metadata(".svg"))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 role="img"', svg, count=1)
    # Ids of groups repeat from figure to figure; only those of shapes and clips are pointed at.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    for colour, page_colour in _PAGE_COLOURS.items():
        svg = svg.replace(colour, page_colour)
    return svg


def _no_metadata(suffix: str) -> dict[str, None]:
    """Leaves out the date and the namespace links, so that equal runs give equal files."""
    return dict.fromkeys(("Creator", "Date", "Format", "Type")) if suffix == ".svg" else {}
