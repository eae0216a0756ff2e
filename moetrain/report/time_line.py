"""The account of a run's time: its lives on one line, and a table of the sums.

Owns how the account looks on the page. Leaves the sums to moetrain.observe.
"""

from collections import Counter
from collections.abc import Sequence

from data_pipeline.quantities import duration
from moetrain.observe import Account, Span
from moetrain.observe.ledger import INTERRUPTED, KINDS

MAX_PIECES = 600  # narrower ones couldn't be told apart


def section(account: Account | None) -> str:
    """The section on time; empty if nothing is known of it."""
    if account is None or account.effective is None:
        return ""
    whole = account.spans[-1].end - account.spans[0].begin
    pieces = "".join(
        f'<i class="{_colour(span.kind)}" style="left:{_percent(span.begin / whole)};'
        f'width:{_percent((span.end - span.begin) / whole)}" title="{KINDS[span.kind]}, '
        f'{duration(span.end - span.begin)}"></i>'
        for span in joined(account.spans, shortest=whole / MAX_PIECES)
    )
    rows = "".join(
        f'<tr><th scope="row"><i class="{_colour(kind)}"></i>{kind}</th>'
        f"<td>{duration(seconds)}</td><td>{seconds / account.wall:.1%}</td>"
        f"<td>{KINDS[kind]}</td></tr>"
        for kind, seconds in account.seconds.items()
        if seconds > 0
    )
    return (
        f'<section><h2>Time</h2><p class="note">{_note(account, whole)}</p>'
        f'<div class="line">{pieces}</div><table class="time">{rows}</table></section>'
    )


def joined(spans: Sequence[Span], *, shortest: float) -> list[Span]:
    """Returns the spans; short neighbours are merged and named after their largest part."""
    groups: list[list[Span]] = []
    for span in spans:
        last = groups[-1] if groups else None
        if last and span.begin <= last[-1].end and last[-1].end - last[0].begin < shortest:
            last.append(span)
        else:
            groups.append([span])
    return [_one(group) for group in groups]


def _one(spans: Sequence[Span]) -> Span:
    seconds: Counter[str] = Counter()
    for span in spans:
        seconds.update({span.kind: span.end - span.begin})
    return Span(kind=seconds.most_common(1)[0][0], begin=spans[0].begin, end=spans[-1].end)


def _note(account: Account, whole: float) -> str:
    notes = [f"Steps that count took {account.effective:.1%} of {duration(account.wall)}."]
    if many := account.interruptions:
        times = "1 interruption" if many == 1 else f"{many} interruptions"
        notes.append(f"{times} cost {duration(account.lost)}.")
    if steps := account.redone_steps:
        notes.append("1 step was lost." if steps == 1 else f"{steps:,} steps were lost.")
    if whole - account.wall >= 0.1:
        rested = duration(whole - account.wall)
        notes.append(f"It was stopped on request, or finished, for {rested} (hatched).")
    return " ".join(notes)


def _colour(kind: str) -> str:
    return "kept" if kind == "training" else "lost" if kind in INTERRUPTED else "other"


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"


STYLE = """
.line { position: relative; height: 1.5rem; margin: .6rem 0 .8rem; overflow: hidden;
  border-radius: .3rem; background: repeating-linear-gradient(135deg, var(--line) 0 2px,
  transparent 2px 8px); }
.line i { position: absolute; top: 0; bottom: 0; min-width: 1px; }
i.kept { background: var(--green); } i.lost { background: var(--red); }
i.other { background: var(--faint); }
.time th, .time td { text-align: left; font-weight: 400; padding: .15rem 1.2rem .15rem 0;
  white-space: nowrap; } .time td:last-child { width: 100%; color: var(--faint);
  white-space: normal; } .time td:nth-child(2), .time td:nth-child(3) { text-align: right; }
.time i { display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem;
  margin-right: .5rem; }
"""
