"""Progress: a live bar on a terminal, a line from time to time in a log.

Owns what people see on standard error while bytes are processed. Leaves results to the caller.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_pipeline.quantities import decimal_size, duration

_SECONDS_BETWEEN_LINES = 10.0


class ByteCounter(Protocol):
    """Receives the progress of some work."""

    def advance(self, num_bytes: int) -> None:
        """Adds `num_bytes` to the work done."""
        ...


@contextmanager
def byte_progress(what: str, *, num_bytes: int, shown: bool) -> Iterator[ByteCounter]:
    """Shows the bytes done of `num_bytes`, bytes/s and the time left, within the context."""
    console = Console(stderr=True)
    if not shown:
        yield _Silence()
    elif not console.is_terminal:
        yield _Lines(what, num_bytes)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield _Bar(bar, what, num_bytes)


def tell(message: str, *, shown: bool) -> None:
    """Prints a message if progress is shown; not for use while a bar is displayed."""
    if shown:
        print(message, file=sys.stderr, flush=True)


class _Silence:
    def advance(self, num_bytes: int) -> None:
        pass


class _Bar:
    def __init__(self, bar: Progress, what: str, num_bytes: int) -> None:
        self._bar = bar
        self._task = bar.add_task(what, total=num_bytes)

    def advance(self, num_bytes: int) -> None:
        self._bar.advance(self._task, num_bytes)


class _Lines:
    def __init__(self, what: str, num_bytes: int) -> None:
        self._what = what
        self._total = num_bytes
        self._done = self._done_printed = 0
        self._printed = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if now - self._printed < _SECONDS_BETWEEN_LINES or self._done == self._done_printed:
            return
        # The rate since the last line: a resumed build skips quickly over finished work.
        speed = (self._done - self._done_printed) / (now - self._printed)
        self._printed, self._done_printed = now, self._done
        left = max(self._total - self._done, 0) / speed
        print(
            f"{self._what}: {decimal_size(self._done)} of {decimal_size(self._total)}, "
            f"{decimal_size(speed)}/s, {duration(left, whole=True)} left",
            file=sys.stderr,
        )
