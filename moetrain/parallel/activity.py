"""What a rank is doing now, written by the training thread and read by the monitor.

Owns phase, step, layer and collective, and the time of the last report. Leaves timeouts to the
monitor.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

BETWEEN_STEPS = "between steps"
STEP_PHASES = (
    BETWEEN_STEPS,
    "reading data",
    "counting tokens",
    "forward",
    "backward",
    "summing up",
    "optimizer",
)
# The phases whose duration is predictable. Reading data isn't: it may wait for a server.
COMPUTING_PHASES = tuple(phase for phase in STEP_PHASES if phase != "reading data")
RECENT_STEPS, MIN_STEPS = 100, 5


@dataclass(frozen=True, kw_only=True)
class Doing:
    """One moment of a rank's work."""

    phase: str = "starting"
    step: int = 0
    """Optimizer steps taken before."""
    layer: int | None = None
    """The transformer layer that is being computed, counted from 0; None outside of layers."""
    collective: str | None = None
    """The collective that the rank waits in, with its counts; None: not known to wait. FSDP's
    gathers and reduce-scatters aren't reported here; stacks show them."""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        waiting = "" if self.collective is None else f", waiting for {self.collective}"
        return f"{self.phase} at step {self.step}{layer}{waiting}"


class Activity:
    """What one rank is doing; each report is a heartbeat. Readable from any thread."""

    def __init__(self) -> None:
        self._now = (Doing(), time.monotonic())  # replaced as a whole, so that readers need no lock
        self._alive = 0.0
        self._step_began: float | None = None
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def begin(self, phase: str, *, step: int | None = None) -> None:
        """Begins a phase, in the same step unless another is given."""
        if phase == BETWEEN_STEPS or phase not in STEP_PHASES:
            now = time.monotonic()
            if self._step_began is not None:
                self._step_seconds.append(now - self._step_began)
            self._step_began = now if phase == BETWEEN_STEPS else None
        step = self._now[0].step if step is None else step
        self._say(Doing(phase=phase, step=step))

    def layer(self, number: int) -> None:
        """Reports the layer that is being computed."""
        self._say(replace(self._now[0], layer=number))

    @contextmanager
    def collective(self, name: str) -> Iterator[None]:
        """Reports a collective while the context lasts; after an error its name stays."""
        self._say(replace(self._now[0], collective=name))
        yield
        self._say(replace(self._now[0], collective=None))

    def goes_on(self) -> None:
        """Sends a heartbeat during a long operation; callable from any thread."""
        self._alive = time.monotonic()

    def read(self) -> tuple[Doing, float]:
        """Returns the current activity, and the seconds since the last report or heartbeat."""
        doing, since = self._now
        return doing, time.monotonic() - max(since, self._alive)

    def slowest_step(self) -> float | None:
        """Returns the seconds of the slowest recent step; None before there are enough steps."""
        seconds = tuple(self._step_seconds)
        return max(seconds) if len(seconds) >= MIN_STEPS else None

    def _say(self, doing: Doing) -> None:
        self._now = (doing, time.monotonic())
