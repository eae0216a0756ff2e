"""How figures look: one palette, quiet axes, colours that work on a light and on a dark page.

Owns the style, the axes and the SVG that stands in a page. Leaves what is drawn to figures.py, and
to those of a comparison.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from data_pipeline.quantities import count
from moetrain.report.run_record import Floats, Series

BLUE, ORANGE, GREEN, RED, PURPLE = "#4285d4", "#e8833a", "#35a07a", "#d9566a", "#8f74d8"
TEAL, PINK, OLIVE = "#22a3b8", "#d873ac", "#a89432"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, PINK, OLIVE)

# Colours of no curve: they become the page's own text and line colours.
INK, FAINT, _GRID = "#343b48", "#5f6877", "#d9dde3"
_PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--faint)", _GRID: "var(--line)"}

MAX_POINTS = 700

# Any, since what matplotlib's stubs call these names differs from release to release.
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": FAINT,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "font.family": "sans-serif",
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": FAINT,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "moetrain",  # the same run draws the same bytes
    "xtick.color": _GRID,
    "xtick.labelcolor": FAINT,
    "xtick.labelsize": 9,
    "ytick.color": _GRID,
    "ytick.labelcolor": FAINT,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
}


def single(draw: Callable[[Axes], None], *, width: float, height: float) -> Figure:
    """A figure of one panel."""
    fig = Figure(figsize=(width, height), layout="constrained")
    draw(fig.subplots())
    return fig


def colours_of(count: int) -> Sequence[str]:
    """A colour for each of some experts or arms."""
    if count <= len(PALETTE):
        return PALETTE
    around = LinearSegmentedColormap.from_list("experts", PALETTE)
    return [to_hex(around(index / (count - 1))) for index in range(count)]


def draw_noisy(ax: Axes, series: Series, colour: str, *, label: str | None = None) -> None:
    """A faint line of all values with a smooth one over it; a lone record is a dot."""
    steps, values = thinned(series)
    scale_steps(ax, steps, num_ticks=5)
    if len(steps) < 2:
        ax.plot(steps, values, "o", color=colour, label=label)
        return
    if len(steps) < 30:
        ax.plot(steps, values, color=colour, label=label)
    else:
        ax.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
        ax.plot(steps, smoothed(values), color=colour, label=label)


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


def smoothed(values: Floats) -> Floats:
    """A centred mean over a fortieth of the curve, narrower at its ends, so that it never lags."""
    half = max(1, len(values) // 80)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    return np.asarray((total[place + reach + 1] - total[place - reach]) / (2 * reach + 1))


def scale_y(ax: Axes, curves: Sequence[Floats]) -> None:
    """A logarithmic axis with plain numbers where the values span more than a factor of 2.5."""
    ax.yaxis.set_major_formatter(FuncFormatter(number))
    values = np.concatenate(curves) if curves else np.empty(0)
    if len(values) and values.min() > 0 and values.max() / values.min() > 2.5:
        ax.set_yscale("log")
        decades = math.log10(values.max() / values.min())
        subs = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(FuncFormatter(number))


def number(value: float, _position: int | None = None) -> str:
    """A tick's text."""
    return count(value)


def step_span(steps: Floats) -> tuple[float, float]:
    """The limits of an axis with these steps."""
    first, last = float(steps[0]), float(steps[-1])
    return (first, last) if last > first else (first - 1, first + 1)


def scale_steps(ax: Axes, steps: Floats, *, num_ticks: int) -> None:
    """A few whole numbers as ticks."""
    ax.xaxis.set_major_locator(MaxNLocator(num_ticks, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(number))
    if len(steps) < 2:
        ax.set_xlim(*step_span(steps))


def on_page(make: Callable[[], Figure], *, salt: str = "") -> str:
    """SVG to stand in an HTML page: its texts are texts, its ink is the page's.

    With a `salt`, its ids are other than those of figures that the page may hide.
    """
    file = io.StringIO()
    style: Any = {**STYLE, "svg.fonttype": "none", "svg.hashsalt": STYLE["svg.hashsalt"] + salt}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A browser has fonts for what matplotlib's own can't show.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        make().savefig(file, format="svg", transparent=True, metadata=no_metadata(".svg"))
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


def no_metadata(suffix: str) -> dict[str, None]:
    """Leaves out the date and the namespace links, so that equal runs give equal files."""
    return dict.fromkeys(("Creator", "Date", "Format", "Type")) if suffix == ".svg" else {}
