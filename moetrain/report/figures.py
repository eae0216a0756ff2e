"""The figures of a report.

Each function takes a run and returns SVG text, or None if there is nothing to draw. Leaves the look
of curves to drawing.py, and the page to page.py.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moetrain.report.drawing import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    OLIVE,
    ORANGE,
    PURPLE,
    RED,
    STYLE,
    TEAL,
    colours_of,
    draw_noisy,
    no_metadata,
    number,
    on_page,
    scale_steps,
    scale_y,
    single,
    step_span,
)
from moetrain.report.run_record import ExpertLoads, RunRecord, Series, read_run

# Underloaded experts are blue, a fair share is pale, overloaded ones are orange.
_LOAD_COLOURS = LinearSegmentedColormap.from_list("load", [BLUE, "#c9dcf3", "#f6f4ef", ORANGE, RED])

MAX_CURVE_LAYERS, MAX_CURVE_EXPERTS = 8, 16


def loss_figure(run: RunRecord) -> str | None:
    """Training and validation loss over the steps."""
    if not (_training_loss(run) or run.get("validation/loss")):
        return None
    return on_page(lambda: single(lambda ax: _draw_loss(ax, run), width=9.6, height=3.4))


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
        fig.supxlabel("step", fontsize=9, color=FAINT)
        fig.supylabel("expert" if as_map else "share of tokens", fontsize=9, color=FAINT)
        if as_map:
            _colour_scale(fig, axes, loads)
        return fig

    return on_page(figure)


def shows_load_map(loads: ExpertLoads) -> bool:
    """Whether the loads are drawn as heat maps: too many experts or layers, or too little time."""
    few = len(loads.layers) <= MAX_CURVE_LAYERS and loads.num_experts <= MAX_CURVE_EXPERTS
    return not few or len(loads.steps) < 2


def figure_for_readme(run_dir: Path | str, *, to: Path | str) -> Path:
    """Write one wide picture, loss beside expert load, as SVG or PNG by the name's ending."""
    run, to = read_run(Path(run_dir)), Path(to)
    style = {**STYLE, "svg.fonttype": "path"}  # an image in a README can't rely on fonts
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
            right.text(0.5, 0.5, "no expert load logged", ha="center", color=FAINT)
        else:
            _draw_readme_loads(right, loads)
        fig.savefig(to, dpi=160, metadata=no_metadata(to.suffix))
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
        draw_noisy(ax, training, BLUE, label="training")
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
    scale_y(ax, [s.values for s in (training, validation) if s])
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper right")


def _draw_load_curves(ax: Axes, loads: ExpertLoads, layer: int) -> None:
    colours = colours_of(loads.num_experts)
    for expert in range(loads.num_experts):
        line = loads.loads[:, layer, expert]
        ax.plot(loads.steps, line, color=colours[expert], linewidth=1.2, alpha=0.9)
    fair = 1 / loads.num_experts
    ax.axhline(fair, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="fair share")
    # The same scale for all layers, so that a crowded one stands out; a collapse needs it whole.
    top = float(np.nanmax(loads.loads, initial=fair))
    ax.set_ylim(0, min(1.02, max(2 * fair, 1.1 * top)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    scale_steps(ax, loads.steps, num_ticks=3)


def _draw_load_map(ax: Axes, loads: ExpertLoads, layer: int) -> None:
    ax.imshow(
        loads.loads[:, layer].T * loads.num_experts,
        aspect="auto",
        cmap=_LOAD_COLOURS,
        extent=(*step_span(loads.steps), loads.num_experts - 0.5, -0.5),
        interpolation="nearest",
        vmin=0,
        vmax=2,
    )
    ax.grid(visible=False)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    scale_steps(ax, loads.steps, num_ticks=3)


def _colour_scale(figure: Any, axes: Any, loads: ExpertLoads) -> None:
    image = axes.flat[0].images[0]
    shrink = min(0.7, 2 / len(axes))  # as tall as two rows of layers
    scale = figure.colorbar(image, ax=axes, shrink=shrink, aspect=22, pad=0.015, ticks=[0, 1, 2])
    scale.outline.set_visible(False)
    scale.ax.set_yticklabels(["none", f"fair: 1/{loads.num_experts}", "twice or more"])
    scale.ax.tick_params(length=0)


def _panels(panels: Sequence[tuple[str, Series, str, bool]]) -> str | None:
    """Panels side by side for the series that were logged; the last field asks for a log scale."""
    there = [panel for panel in panels if panel[1]]
    if not there:
        return None

    def figure() -> Figure:
        fig = Figure(figsize=(9.6, 2.6), layout="constrained")
        axes = fig.subplots(1, len(there), squeeze=False)
        for ax, (title, series, colour, logarithmic) in zip(axes.flat, there, strict=True):
            draw_noisy(ax, series, colour)
            if logarithmic:
                scale_y(ax, [series.values])
            else:
                lowest, highest = float(series.values.min()), float(series.values.max())
                ax.set_ylim(min(0.0, lowest), 1.08 * highest if highest > 0 else 1.0)
                ax.yaxis.set_major_locator(MaxNLocator(5))
                ax.yaxis.set_major_formatter(FuncFormatter(number))
            ax.set_title(title)
            ax.set_xlabel("step")
        return fig

    return on_page(figure)


def _training_loss(run: RunRecord) -> Series:
    return run.get("train/cross_entropy") or run.get("train/loss")
