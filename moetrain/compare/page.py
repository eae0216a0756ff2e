"""compare.html: one file with a comparison's tables and curves, readable anywhere, offline.

Owns the page, and that nothing in it is foreign markup: every name and value is escaped. Leaves the
words to text, and the curves to figures.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from data_pipeline.atomic_files import write_file
from moetrain.compare import text
from moetrain.compare.arms import seed_label
from moetrain.compare.comparison import OUTSIDE, ArmDifference, Comparison, Table
from moetrain.compare.figures import curves_figure
from moetrain.compare.run_results import AXES
from moetrain.redaction import redacted_text
from moetrain.report.drawing import colours_of
from moetrain.report.page import document

PAGE = "compare.html"
_HALF = 100
"""Half the width of an interval's picture."""


def write_page(comparison: Comparison, folder: Path) -> Path:
    """Writes the page into a folder, and returns its path; raises OSError where it can't.

    The file appears whole or not at all.
    """
    path = folder / PAGE
    write_file(path, page(comparison).encode(errors="backslashreplace"), durable=False)
    return path


def page(comparison: Comparison) -> str:
    """Returns the HTML of a comparison."""
    colours = dict(zip((arm.name for arm in comparison.arms), _colours(comparison), strict=False))
    parts = [
        f"<header><h1>{_text(text.compared(comparison))}</h1></header>",
        _facts(comparison),
        _section("Means over seeds", _table(*text.means(comparison.main), colours=colours)),
    ]
    if comparison.main.differences:
        title = text.against(comparison)
        title = title[:1].upper() + title[1:]
        parts.append(_section(title, _differences(comparison.main, colours)))
    parts += [f'<p class="note">{_text(note)}.</p>' for note in text.noise_notes(comparison)]
    parts.append(_curves(comparison))
    for table in comparison.sources:
        title = f"{text.unit_of(table.measure)} of {table.source}"
        parts.append(_section(title, _table(*text.joined(table), colours=colours)))
    if comparison.counts:
        parts.append(_section("Counts", _table(*text.counts(comparison), colours=colours)))
    parts += [_settings(comparison, colours), _runs(comparison)]
    title = f"{len(comparison.runs)} runs compared"
    return document(
        "\n".join(part for part in parts if part),
        title=title, style=_style(), command="moetrain compare",
    )  # fmt: skip


def _facts(comparison: Comparison) -> str:
    rows = "".join(
        f'<tr class="{label}"><th scope="row">{label}</th><td>{_text(line)}</td></tr>'
        for label, lines in text.facts(comparison).items()
        for line in lines
    )
    return f'<table class="facts">{rows}</table>'


def _section(title: str, body: str) -> str:
    return f'<section><h2>{_text(title)}</h2><div class="wide">{body}</div></section>'


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    colours: dict[str, str],
    pictures: Sequence[str] = (),
) -> str:
    """Returns a table whose first column names arms, each with the colour of its curves."""
    heads = "".join(f"<th>{_text(cell)}</th>" for cell in [*header, *([""] if pictures else [])])
    lines = []
    for place, (name, *cells) in enumerate(rows):
        swatch = f'<i style="background:{colours[name]}"></i>' if name in colours else ""
        picture = f"<td>{pictures[place]}</td>" if pictures else ""
        lines.append(
            f'<tr><th scope="row">{swatch}{_text(name)}</th>'
            + "".join(f"<td{_class(cell)}>{_text(cell)}</td>" for cell in cells)
            + f"{picture}</tr>"
        )
    return f'<table class="arms"><thead><tr>{heads}</tr></thead>{"".join(lines)}</table>'


def _class(cell: str) -> str:
    return ' class="outside"' if cell == OUTSIDE else ""


def _differences(table: Table, colours: dict[str, str]) -> str:
    told = table.differences
    reach = max([abs(x) for d in told for x in _ends(d)], default=0.0) or 1.0
    pictures = [_interval(one, reach, colours.get(one.arm.name, "")) for one in told]
    return _table(*text.differences(table), colours=colours, pictures=pictures)


def _ends(one: ArmDifference) -> tuple[float, ...]:
    found = one.difference
    return (found.value, *(x for x in (found.low, found.high) if x is not None))


def _interval(one: ArmDifference, reach: float, colour: str) -> str:
    """Returns a difference and its interval as a dot and a line, beside zero."""
    at = {x: _HALF * (1 + 0.95 * x / reach) for x in _ends(one)}
    found = one.difference
    line = ""
    if found.low is not None and found.high is not None:
        line = (
            f'<line x1="{at[found.low]:.1f}" x2="{at[found.high]:.1f}" y1="9" y2="9" '
            f'stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
        )
    return (
        f'<svg role="img" viewBox="0 0 {2 * _HALF} 18" width="{2 * _HALF}" height="18">'
        f'<line x1="{_HALF}" x2="{_HALF}" y1="0" y2="18" stroke="currentColor" opacity="0.4"/>'
        f'{line}<circle cx="{at[found.value]:.1f}" cy="9" r="4.5" fill="{colour}"/></svg>'
    )


def _curves(comparison: Comparison) -> str:
    """Returns the curves over each axis, one of which is shown: no script is needed for it."""
    figures = {axis: curves_figure(comparison, axis) for axis in AXES}
    there = {axis: figure for axis, figure in figures.items() if figure}
    if not there:
        return ""
    shown = comparison.axis if comparison.axis in there else next(iter(there))
    choices = "".join(
        f'<input type="radio" name="x" id="x-{axis}"{" checked" if axis == shown else ""}>'
        f'<label for="x-{axis}">{AXES[axis]}</label>'
        for axis in there
    )
    drawn = "".join(
        f'<figure class="by-{axis}">{figure}</figure>' for axis, figure in there.items()
    )
    note = (
        "Lines are means over an arm's runs, bands one standard deviation of them. "
        "Long curves are smoothed."
    )
    return (
        f'<section class="curves"><h2>Curves</h2><p class="note">{note}</p>{choices}{drawn}'
        "</section>"
    )


def _settings(comparison: Comparison, colours: dict[str, str]) -> str:
    names = list(comparison.differing)
    if not names:
        return ""
    rows = [[arm.name, *(arm.settings[name] for name in names)] for arm in comparison.arms]
    return _section("Settings that differ", _table(["arm", *names], rows, colours=colours))


def _runs(comparison: Comparison) -> str:
    rows = list(_run_rows(comparison))
    header = ["run", "arm", "seed", "state", comparison.measure, "folder"]
    return _section("Runs", _table(header, rows, colours={}))


def _run_rows(comparison: Comparison) -> Iterator[list[str]]:
    used = {
        value.run.path: (result.arm.name, f"{value.value:.6g}")
        for result in comparison.main.results
        for value in result.values
    }
    for run in comparison.runs:
        arm, value = used.get(run.path, ("–", "–"))
        yield [run.name, arm, seed_label(run), run.state, value, str(run.path)]


def _colours(comparison: Comparison) -> Sequence[str]:
    return colours_of(len(comparison.arms))


def _text(words: str) -> str:
    return escape(redacted_text(words))


def _style() -> str:
    shown = "".join(f"#x-{a}:checked ~ .by-{a} {{ display: block; }}\n" for a in AXES)
    return f"""
.facts th {{ text-align: left; vertical-align: top; font-weight: 600; white-space: nowrap;
  padding: .15rem 1rem .15rem 0; }} .facts td {{ width: 100%; overflow-wrap: anywhere; }}
.facts .warning {{ color: var(--red); }}
.wide {{ overflow-x: auto; }}
.arms {{ font-size: .9rem; }}
.arms th, .arms td {{ text-align: left; padding: .25rem .9rem .25rem 0; white-space: nowrap;
  border-bottom: 1px solid var(--line); }} .arms thead th {{ color: var(--faint); }}
.arms th[scope] {{ font-weight: 400; white-space: normal; min-width: 9rem; max-width: 24rem;
  overflow-wrap: anywhere; }} .arms td.outside {{ font-weight: 600; }}
.arms i {{ display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem;
  margin-right: .5rem; }}
section.curves input {{ margin-left: 1rem; }} .curves figure {{ display: none; }}
{shown}"""
