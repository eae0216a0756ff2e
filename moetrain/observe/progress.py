"""The progress display of a run, for the person in front of it.

Owns how a metrics record looks on a terminal (a live bar) or in a log (a line now and then), and
the estimate of the time left. It writes to standard error, keeps nothing, and can't stop a run: a
closed terminal only ends the display. The driver feeds it.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from data_pipeline.quantities import count, duration
from moetrain.observe.metrics import Record, by_source
from moetrain.observe.stored_loads import expert_load
from moetrain.redaction import redacted_text

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
# Long enough to smooth a save or a validation, short enough to reflect a slower cluster.
RATE_WINDOW_SECONDS = 60.0
MAX_LOAD_BARS = 32


@dataclass(frozen=True, kw_only=True)
class _View:
    """The displayed state. Replaced as a whole, since the live display reads it in its own
    thread."""

    step: int = 0
    phase: str | None = "starting"
    loss: float | None = None
    tokens_per_second: float | None = None
    load_profile: tuple[float, ...] = ()  # busiest expert first, 1.0 is a fair share
    max_violation: float | None = None
    dead_experts: int | None = None
    validation: str | None = None
    seconds_left: float | None = None
    seen_at: float = 0.0


class _StandardError(Console):
    """rich ends the process on a closed pipe; here it raises a normal error."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("standard error is closed")


class ProgressDisplay:
    """Shows a run's progress, loss, speed and expert balance.

    `mode` is `bar` (live), `lines` (one short line every ten seconds and at each validation),
    `off`, or `auto`: a bar on a terminal, else lines. Use it as a context manager in the driver
    process. Records may lack any key, repeat, or jump back after a restart.
    """

    def __init__(
        self,
        *,
        mode: str,
        total_steps: int,
        run_name: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if console is None:
            console = _StandardError(stderr=True, force_terminal=True if mode == "bar" else None)
        if mode == "auto":
            live = console.is_terminal and not console.is_dumb_terminal
            mode = "bar" if live else "lines"
        self._console = console
        self._mode = mode
        self._total_steps = total_steps
        self._run_name = run_name
        self._clock = clock
        self._view = _View(seen_at=clock())
        self._recent: deque[tuple[float, int]] = deque()
        self._line_at = -math.inf
        self._line_step: int | None = None
        self._live: Live | None = None
        self._spinner = Spinner("dots", style="cyan")

    def __enter__(self) -> Self:
        self._guarded(self._start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._guarded(self._stop)

    def update(self, record: Record) -> None:
        """Show one metrics record."""
        self._guarded(lambda: self._update(record))

    def say(self, text: str) -> None:
        """Prints an event, such as a restart or a save, in a line that stays."""
        self._guarded(lambda: self._say(text))

    def phase(self, text: str) -> None:
        """Shows the current phase while no steps are made; the next record ends it."""
        self._guarded(lambda: self._phase(text))

    def _guarded(self, call: Callable[[], None]) -> None:
        if self._mode == "off":
            return
        try:
            call()
        except Exception as error:  # a closed terminal, an odd record: the run matters more
            self._mode = "off"
            logger.warning("progress display ended: %s: %s", type(error).__name__, error)

    def _start(self) -> None:
        if self._mode == "bar":
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=4,
                # Prints go above the bar, but a piped standard output isn't pulled into it.
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start(refresh=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._line_step not in (None, self._view.step):
            self._print_line()  # the last step belongs in the log

    def _say(self, text: str) -> None:
        stamp = Text(f"{datetime.now():%H:%M:%S} ", style="dim")
        self._console.print(stamp + Text(redacted_text(text)), soft_wrap=True)

    def _phase(self, text: str) -> None:
        self._view = replace(self._view, phase=text, seen_at=self._clock())
        self._recent.clear()  # a pause says nothing about the speed after it
        if self._live is None:
            self._say(text)

    def _update(self, record: Record) -> None:
        now = self._clock()
        seen = _read(record, self._view)
        self._view = replace(
            seen, phase=None, seen_at=now, seconds_left=self._seconds_left(seen.step, record, now)
        )
        if self._live is not None:
            return
        due = now - self._line_at >= SECONDS_BETWEEN_LINES
        due = due or self._line_step == 0  # which has no loss, no speed and no time left
        validated = any(name.startswith("validation/") for name in record)
        if due or validated or seen.step >= self._total_steps:
            self._print_line()

    def _seconds_left(self, step: int, record: Record, now: float) -> float | None:
        """Time left at the pace of the last minute; at first, at that of the step just made."""
        if self._recent and step < self._recent[-1][1]:
            self._recent.clear()  # a restart went back: those steps are repeated
        if not self._recent or step > self._recent[-1][1]:
            self._recent.append((now, step))
        while len(self._recent) > 2 and now - self._recent[1][0] > RATE_WINDOW_SECONDS:
            self._recent.popleft()
        (then, first), (last_at, last) = self._recent[0], self._recent[-1]
        steps_left = max(self._total_steps - last, 0)
        if last > first and last_at > then:
            return steps_left * (last_at - then) / (last - first)
        step_seconds = record.get("perf/step_seconds")
        return None if step_seconds is None else steps_left * step_seconds

    def _print_line(self) -> None:
        view = self._view
        self._line_at, self._line_step = view.seen_at, view.step
        parts = [f"step {view.step}/{self._total_steps}", *_figures(view), *_balance(view)]
        if view.seconds_left is not None and view.step < self._total_steps:
            parts.append(f"{duration(view.seconds_left, whole=True)} left")
        self._say("  ".join(parts))

    def _render(self) -> RenderableType:
        view = self._view
        top = Table.grid(padding=(0, 1, 0, 0))
        bar = ProgressBar(
            total=max(self._total_steps, 1),
            completed=view.step,
            width=max(10, min(40, self._console.width - len(self._run_name) - 40)),
            complete_style="cyan",
            finished_style="green",
        )
        top.add_row(
            Text(self._run_name, style="bold", overflow="ellipsis"),
            bar,
            Text(f"{view.step}/{self._total_steps}"),
            Text(self._time_left(view), style="cyan"),
        )
        rows: list[RenderableType] = [top]
        if view.phase is not None:
            waited = f"{view.phase} · {duration(self._clock() - view.seen_at, whole=True)}"
            self._spinner.update(text=Text(waited))
            rows.append(self._spinner)
        if figures := _figures(view):
            rows.append(Text("  " + " · ".join(figures), overflow="ellipsis", no_wrap=True))
        if balance := _balance(view):
            rows.append(self._balance_row(view, balance))
        return Group(*rows)

    def _balance_row(self, view: _View, balance: Sequence[str]) -> Text:
        row = Text("  ", overflow="ellipsis", no_wrap=True)
        if view.load_profile:
            ascii_only = not self._console.encoding.startswith("utf")
            row.append("expert load ")
            row.append(load_bars(view.load_profile, ascii_only=ascii_only), style="magenta")
            row.append(" · ")
        unwell = bool(view.dead_experts) or (view.max_violation or 0.0) > 1.0
        return row.append(" · ".join(balance), style="yellow" if unwell else "")

    def _time_left(self, view: _View) -> str:
        if view.seconds_left is None:
            return ""
        if view.step >= self._total_steps:
            return "done"
        if view.phase is not None:
            return ""
        since = self._clock() - view.seen_at
        return f"{duration(view.seconds_left - since, whole=True)} left"


def load_bars(profile: Sequence[float], *, ascii_only: bool = False) -> str:
    """A row of bars for loads relative to a fair share, which is half the height.

    More experts than MAX_LOAD_BARS share a bar with their neighbours.
    """
    signs = "_.-=+*%#" if ascii_only else "▁▂▃▄▅▆▇█"
    count = min(len(profile), MAX_LOAD_BARS)
    bars = ""
    for bar in range(count):
        group = profile[bar * len(profile) // count : (bar + 1) * len(profile) // count]
        height = sum(group) / len(group) / 2 * len(signs)
        bars += signs[max(0, min(len(signs) - 1, round(height) - 1))]
    return bars


def load_profile(record: Record) -> tuple[float, ...]:
    """Loads relative to a fair share, sorted in each layer and then averaged over the layers.

    Sorted first because expert 3 of one layer has nothing to do with expert 3 of the next:
    averaged by number, four collapsed layers would look balanced.
    """
    loads = expert_load(record)
    if loads is None or not np.isfinite(loads).all():
        return ()
    profile = -np.sort(-loads, axis=1).mean(0) * loads.shape[1]
    return tuple(profile.tolist())


def _read(record: Record, before: _View) -> _View:
    def last(name: str, known: float | None) -> float | None:
        value = record.get(name)
        return known if value is None else value

    dead = last("router/dead_experts", before.dead_experts)
    return replace(
        before,
        step=int(last("step", before.step) or 0),
        loss=last("train/cross_entropy", last("train/loss", before.loss)),
        tokens_per_second=last("perf/tokens_per_second", before.tokens_per_second),
        load_profile=load_profile(record) or before.load_profile,
        max_violation=last("router/max_violation", before.max_violation),
        dead_experts=None if dead is None else int(dead),
        validation=_validation(record) or before.validation,
    )


def _validation(record: Record) -> str | None:
    parts = []
    loss = record.get("validation/loss")
    if loss is not None:
        parts.append(f"{loss:.3f}")
    known = by_source(record, "bits_per_byte")
    sources = [(source, value) for source, value in known.items() if value is not None]
    for source, value in sources[:3]:
        parts.append(f"{source} {value:.3f} bits/byte")
    if len(sources) > 3:
        parts.append(f"and {len(sources) - 3} more")
    return ", ".join(parts) or None


def _figures(view: _View) -> list[str]:
    figures = []
    if view.loss is not None:
        figures.append(f"loss {view.loss:.3f}")
    if view.validation is not None:
        figures.append(f"validation {view.validation}")
    if view.tokens_per_second is not None:
        figures.append(f"{count(view.tokens_per_second)} tokens/s")
    return figures


def _balance(view: _View) -> list[str]:
    balance = []
    if view.max_violation is not None:
        balance.append(f"max violation {view.max_violation:.2f}")
    if view.dead_experts is not None:
        plural = "" if view.dead_experts == 1 else "s"
        balance.append(f"{view.dead_experts or 'no'} dead expert{plural}")
    return balance
