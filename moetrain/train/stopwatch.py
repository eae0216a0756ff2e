"""The time since the last record, and what it went to."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Time, tokens and steps since the last record."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a new span."""
        self._start = time.perf_counter()
        self._steps = self._tokens = 0
        self._waited = 0.0
        self._stalled: float | None = None

    def count(self, tokens: int) -> None:
        """Counts a step and its tokens."""
        self._steps += 1
        self._tokens += tokens

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time in the context as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Counts the time in the context as stalled by a checkpoint."""
        start = time.perf_counter()
        yield
        self._stalled = (self._stalled or 0.0) + time.perf_counter() - start

    def step_seconds(self) -> float:
        """Mean duration of a step in the span."""
        return (time.perf_counter() - self._start) / max(1, self._steps)

    def tokens_per_second(self) -> float:
        """Tokens of the global batches over the span's duration."""
        return self._tokens / (time.perf_counter() - self._start)

    def data_wait_seconds(self) -> float:
        """Mean time that a step waited for its data."""
        return self._waited / max(1, self._steps)

    def stall_seconds(self) -> float | None:
        """Time that training was stalled by checkpoints in the span; None where none was saved."""
        return self._stalled
