"""report.html: one file that describes a run, readable anywhere, offline, in light or dark.

Owns the words, tables and style of the page, and that nothing in it is foreign markup: every name,
value and reason is escaped. Leaves the curves to figures.py, and the account of time to
time_line.py.
"""

from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from data_pipeline.atomic_files import write_file
from data_pipeline.quantities import count, duration
from moetrain.report import figures, time_line
from moetrain.report.run_record import RunRecord, read_run

MAX_EVENTS = 200
_BASELINES = {
    "byte_bigram_bits_per_byte": "byte bigrams",
    "zlib_bits_per_byte": "zlib, level 9,",
}
_NOT_FOR_PEOPLE = ("time", "event", "reason", "step", "clock", "last_sign", "spent", "changes")


def render_report(run_dir: Path | str) -> Path:
    """Writes `<run_dir>/report.html` from whatever the run has logged so far, and returns its path.

    The file appears whole or not at all. Raises OSError if it can't be written.
    """
    path = Path(run_dir) / "report.html"
    text = page(read_run(Path(run_dir)))
    write_file(path, text.encode(errors="backslashreplace"), durable=False)
    return path


def page(run: RunRecord) -> str:
    """The HTML of a run."""
    name = escape(run.name)
    body = "\n".join(
        [
            f"<header><h1>{name}</h1>{_state(run)}</header>",
            _headline(run),
            _bits_per_byte(run),
            _section("Loss", figures.loss_figure(run)),
            _section(
                "Expert load",
                figures.expert_load_figure(run),
                note=_load_note(run),
            ),
            _section("Balance of the router", figures.balance_figure(run)),
            _section("Throughput", figures.throughput_figure(run)),
            time_line.section(run.account),
            _section("Optimisation", figures.optimisation_figure(run)),
            _events(run.events),
            _configuration(run.config_text),
        ]
    )
    return document(body, title=name, style=time_line.STYLE, command="python -m moetrain.report")


def document(body: str, *, title: str, style: str, command: str) -> str:
    """A whole page around its body; all texts are HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title} · moetrain</title>\n<style>{_STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n"
        f"<footer>Written by <code>{command}</code></footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _state(run: RunRecord) -> str:
    reason = f" {escape(run.reason)}" if run.reason else ""
    state = escape(run.state)
    return f'<p class="state"><span class="badge {state}">{state}</span>{reason}</p>'


def _headline(run: RunRecord) -> str:
    tiles = []
    parameters, active = (run.model.get(key) for key in ("parameters", "active_parameters"))
    if isinstance(parameters, int) and isinstance(active, int):
        tiles.append(_tile("parameters", count(parameters), f"{count(active)} active"))
    step = run.get("step")
    if step:
        asked = f"of {run.num_steps:,}" if run.num_steps else ""
        tiles.append(_tile("steps", f"{step.last:,.0f}", asked))
    if tokens := run.get("train/tokens"):
        tiles.append(_tile("tokens", count(tokens.last)))
    if run.final_loss is not None:
        tiles.append(_tile("training loss", f"{run.final_loss:.3f}", "nats, last tenth"))
    if validation := run.get("validation/loss"):
        tiles.append(_tile("validation loss", f"{validation.last:.3f}", "nats a token"))
    if speed := run.get("perf/tokens_per_second"):
        middle = sorted(speed.values)[len(speed.values) // 2]
        tiles.append(_tile("tokens a second", count(middle), "median"))
    if violation := run.get("router/max_violation"):
        dead = run.get("router/dead_experts")
        num_dead = f"{dead.last:.0f}" if dead and dead.last else "no"
        note = f"{num_dead} dead expert{'' if num_dead == '1' else 's'}" if dead else ""
        tiles.append(_tile("max violation", f"{violation.last:.2f}", note))
    if run.account and run.account.effective is not None:
        of = f"of {duration(run.account.wall)}"
        tiles.append(_tile("effective time", f"{run.account.effective:.1%}", of))
    nothing = "" if step else '<p class="empty">No metrics have been logged yet.</p>'
    return (f'<div class="tiles">{"".join(tiles)}</div>' if tiles else "") + nothing


def _tile(label: str, value: str, note: str = "") -> str:
    return f'<div class="tile"><b>{value}</b><span>{label}</span><small>{note}</small></div>'


def _bits_per_byte(run: RunRecord) -> str:
    """The model's bits per byte by source, beside baselines of the same text."""
    ours = {s: series.last for s, series in run.by_source("bits_per_byte").items() if series}
    if not ours:
        return ""
    rows = []
    for source, bits in sorted(ours.items()):
        rows.append((source, bits, "model"))
        known = run.baselines.get(source, {})
        rows += [
            (f"{label} on {source}", known[name], "baseline")
            for name, label in _BASELINES.items()
            if name in known
        ]
    widest = max(bits for _, bits, _ in rows) or 1.0
    bars = "".join(
        f'<tr class="{kind}"><th scope="row">{escape(label)}</th>'
        f'<td class="bar"><i style="width:{100 * bits / widest:.1f}%"></i></td>'
        f"<td>{bits:.3f}</td></tr>"
        for label, bits, kind in rows
    )
    return (
        '<section><h2>Bits per byte on held-out text</h2><p class="note">Lower is better.</p>'
        f'<table class="bars">{bars}</table></section>'
    )


def _section(title: str, figure: str | None, *, note: str = "") -> str:
    if figure is None:
        return ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}<figure>{figure}</figure></section>"


def _load_note(run: RunRecord) -> str:
    loads = run.expert_loads
    if loads is None:
        return ""
    line = "" if figures.shows_load_map(loads) else " (dashed)"
    return (
        f"The share of a layer's tokens that each of its {loads.num_experts} experts received. "
        f"A fair share{line} is {100 / loads.num_experts:.3g}%."
    )


def _events(events: list[dict[str, Any]]) -> str:
    if not events:
        return ""
    shown = events[-MAX_EVENTS:]
    rows = "".join(
        f"<tr><td>{escape(_clock(event))}</td><td>{escape(str(event.get('event', '')))}</td>"
        f"<td>{escape(_text(event.get('step')))}</td><td>{_details(event)}</td></tr>"
        for event in shown
    )
    counts = Counter(str(event.get("event", "")) for event in events)
    summary = ", ".join(f"{times} × {kind}" for kind, times in counts.most_common(12))
    left_out = len(events) - len(shown)
    note = f"{summary}." + (f" The first {left_out} are left out below." if left_out else "")
    return (
        f'<section><h2>Events</h2><p class="note">{escape(note)}</p><div class="scroll">'
        '<table class="events"><thead><tr><th>time (UTC)</th><th>event</th><th>step</th>'
        f"<th>reason and details</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _details(event: dict[str, Any]) -> str:
    reason = event.get("reason")
    rest = {k: v for k, v in event.items() if k not in _NOT_FOR_PEOPLE}
    fields = ", ".join(f"{key}={_text(value)}" for key, value in rest.items())
    if len(fields) > 400:
        fields = fields[:400] + " …"
    parts = [escape(_text(reason)), f"<small>{escape(fields)}</small>" if fields else ""]
    return " ".join(part for part in parts if part)


def _configuration(text: str) -> str:
    if not text:
        return ""
    return (
        "<section><h2>Configuration</h2><details><summary>config.yaml</summary>"
        f"<pre>{escape(text)}</pre></details></section>"
    )


def _clock(event: dict[str, Any]) -> str:
    return _text(event.get("time")).replace("T", " ").split(".")[0].removesuffix("+00:00")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_STYLE = """
:root { --paper: #ffffff; --ink: #1f2430; --faint: #667080; --line: #e2e5ea; --card: #f6f7f9;
  --blue: #4285d4; --orange: #e8833a; --green: #2f9a70; --red: #d9566a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e4e7ec; --faint: #97a1b0;
  --line: #2c323b; --card: #1c2027; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; }
.state { margin: .5rem 0 1.5rem; color: var(--faint); }
.badge { padding: .1rem .6rem; border-radius: 1rem; font-size: .85rem; color: #fff;
  background: var(--faint); margin-right: .35rem; }
.badge.finished { background: var(--green); } .badge.failed { background: var(--red); }
.badge.running { background: var(--blue); } .badge.stopped { background: var(--orange); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; }
.tile { flex: 1 1 7rem; background: var(--card); border-radius: .6rem; padding: .8rem; }
.tile b, .tile span, .tile small { display: block; white-space: nowrap; }
.tile b { font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { font-size: .9rem; } .tile small { color: var(--faint); min-height: 1.2em; }
.note, .empty { color: var(--faint); font-size: .9rem; margin: 0 0 .6rem; }
figure { margin: .5rem 0 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.bars th { text-align: left; font-weight: 400; white-space: nowrap; padding: .2rem 1rem .2rem 0; }
.bars td:last-child { text-align: right; padding-left: 1rem; }
.bars .bar { width: 100%; } .bars i { display: block; height: .9rem; border-radius: .2rem;
  background: var(--blue); } .bars .baseline i { background: var(--faint); opacity: .55; }
.bars .baseline { color: var(--faint); } .bars .model { font-weight: 600; }
.scroll { overflow-x: auto; max-height: 32rem; overflow-y: auto; }
.events { font-size: .88rem; }
.events th, .events td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid var(--line); }
.events td:first-child { white-space: nowrap; color: var(--faint); }
.events td:last-child { overflow-wrap: anywhere; } .events small { color: var(--faint); }
details { background: var(--card); border-radius: .6rem; padding: .6rem 1rem; }
summary { cursor: pointer; } pre { overflow-x: auto; font-size: .82rem; line-height: 1.45; }
footer { margin-top: 3rem; color: var(--faint); font-size: .85rem; }
"""
