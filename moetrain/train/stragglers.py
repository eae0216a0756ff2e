"""Stragglers: ranks that are slower than their peers, although all take their steps together.

A step lasts as long on every rank as on the slowest, so step times don't show stragglers. Owns the
measurement of two times in which a rank waits for no other, the forward pass of attention (the same
work on every rank, without an exchange) and the wait for data; their comparison over the ranks; and
when to report. Leaves any reaction to people or to the launcher.
"""

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moetrain.kinds import EventKind
from moetrain.model import Attention
from moetrain.parallel import Activity, gather_objects, gather_over_ranks

# A rank is reported if it is so much slower in each of so many consecutive windows. A window has at
# least so many steps, and lasts long enough for the scheduler's noise to average out.
MARGIN, WINDOWS = 1.5, 3
WINDOW_STEPS, WINDOW_SECONDS = 10, 30.0
OVER = 1.25  # the end is reported once it is below this as often
MAX_TIMED_CALLS = 512  # on CUDA, between two records: each costs two events
MAX_RATIO = 100.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to report about a rank."""

    rank: int
    kind: Literal["slow", "slower", "over"]
    ratio: float
    """Its time ÷ the median of the others', or a step's ÷ what it would be without its wait."""
    reason: str


class Stragglers:
    """Compares the ranks at each metrics record, on all ranks alike, and reports stragglers."""

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        step: int,
        activity: Activity,
        event: Callable[..., None],
        say: Callable[[str], None],
    ) -> None:
        """All ranks call it. `step` is where training begins; `event` and `say` report findings."""
        self._attention: _CpuTimer | _CudaTimer
        self._attention = _CudaTimer() if device.type == "cuda" else _CpuTimer()
        for module in model.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(self._attention.begin)
                module.register_forward_hook(self._attention.end)
        self._device, self._step, self._activity = device, step, activity
        self._event, self._say = event, say
        self._nodes: list[str] = gather_objects(socket.gethostname())
        self._watch = Watch()

    def compare(
        self, *, step: int, step_seconds: float, data_wait_seconds: float
    ) -> dict[str, float]:
        """Returns the slowest rank and how much slower than its peers it is; reports findings."""
        mine = torch.tensor(
            [self._attention.take(), data_wait_seconds], dtype=torch.float64, device=self._device
        )
        with self._activity.collective("comparison of the ranks' times"):
            attention, waits = gather_over_ranks(mine).cpu().numpy().T
        num_steps, self._step = step - self._step, step
        window = Times(
            attention=attention, waits=waits, num_steps=num_steps, seconds=num_steps * step_seconds
        )
        self._tell(self._watch.take(window))
        ratios = window.ratios()
        slowest = int(ratios.argmax())
        return {"perf/slowest_rank": slowest, "perf/slowest_rank_ratio": float(ratios[slowest])}

    def _tell(self, findings: Sequence[Finding]) -> None:
        for found in findings:
            self._event(
                EventKind.straggler_over if found.kind == "over" else EventKind.straggler,
                step=self._step,
                rank=found.rank,
                node=self._nodes[found.rank],
                ratio=round(found.ratio, 2),
                reason=found.reason,
            )
        for found in findings[:3]:  # a slow node may have many ranks
            what = "keeps up again" if found.kind == "over" else "slows down all others"
            node = self._nodes[found.rank]
            self._say(f"warning: rank {found.rank} on {node} {what}: {found.reason}")
        if more := findings[3:]:
            self._say(f"warning: the same of ranks {', '.join(str(f.rank) for f in more)}")


@dataclass(frozen=True, kw_only=True)
class Times:
    """What was measured on each rank over some steps; both arrays are [ranks]."""

    attention: Floats
    """Seconds of one layer's attention."""
    waits: Floats
    """Seconds that a step waited for its data."""
    num_steps: int
    seconds: float
    """Seconds of all these steps."""

    def joined(self, other: "Times") -> "Times":
        """Returns the times of both, weighted by their steps."""
        steps = max(1, self.num_steps + other.num_steps)
        mine, theirs = self.num_steps / steps, other.num_steps / steps
        return Times(
            attention=self.attention * mine + other.attention * theirs,
            waits=self.waits * mine + other.waits * theirs,
            num_steps=self.num_steps + other.num_steps,
            seconds=self.seconds + other.seconds,
        )

    def ratios(self) -> Floats:
        """Returns each rank's slowness as a multiple of its peers', [ranks]."""
        return np.maximum(self.computing(), self.waiting())

    def computing(self) -> Floats:
        """Returns the time of attention as a multiple of the median of the others', [ranks]."""
        peers = median_of_others(self.attention)
        ratios = np.divide(self.attention, peers, out=np.ones_like(peers), where=peers > 0)
        bounded: Floats = np.minimum(ratios, MAX_RATIO)
        return bounded

    def waiting(self) -> Floats:
        """Returns how many times as long a step is as it would be without the rank's wait, [ranks].

        The wait is the time by which it waits longer for data than the median of the others.
        """
        step = self.seconds / max(1, self.num_steps)
        longer = np.maximum(0.0, self.waits - median_of_others(self.waits))
        if not step:
            return np.ones_like(longer)
        ratios: Floats = step / np.maximum(step - longer, step / MAX_RATIO)
        return ratios

    def reason(self, rank: int) -> str:
        """Returns a text that says what the rank is slower at."""
        if self.waiting()[rank] > self.computing()[rank]:
            mine, theirs = self.waits[rank], median_of_others(self.waits)[rank]
            return f"waits {mine:.3g} s a step for data, its peers {theirs:.3g} s"
        mine, theirs = self.attention[rank] * 1e3, median_of_others(self.attention)[rank] * 1e3
        return (
            f"computes {mine / max(theirs, 1e-9):.2g} times as long as its peers: {mine:.3g} ms a "
            f"layer's attention, theirs {theirs:.3g} ms"
        )


class Watch:
    """Decides what to report; knows only the times that it is given."""

    def __init__(self) -> None:
        self._begun: Times | None = None
        self._windows: deque[Times] = deque(maxlen=WINDOWS)
        self._told: dict[int, float] = {}

    def take(self, times: Times) -> list[Finding]:
        """Adds the times since the last call, and returns what to report."""
        begun = times if self._begun is None else self._begun.joined(times)
        if begun.num_steps < WINDOW_STEPS or begun.seconds < WINDOW_SECONDS:
            self._begun = begun
            return []
        self._begun = None
        self._windows.append(begun)
        if len(self._windows) < WINDOWS:
            return []
        ratios = np.stack([window.ratios() for window in self._windows])  # [windows, ranks]
        lowest, highest = ratios.min(0), ratios.max(0)
        slow = {int(rank) for rank in np.flatnonzero(lowest >= MARGIN)}
        findings = [
            self._finding(rank, "slower" if rank in self._told else "slow", ratios)
            for rank in sorted(slow)
            if lowest[rank] >= 2 * self._told.get(rank, 0.0)
        ]
        over = sorted(rank for rank in self._told if highest[rank] < OVER)
        return findings + [self._finding(rank, "over", ratios) for rank in over]

    def _finding(
        self, rank: int, kind: Literal["slow", "slower", "over"], ratios: Floats
    ) -> Finding:
        ratio = float(ratios[:, rank].mean())
        if kind == "over":
            del self._told[rank]
        else:
            self._told[rank] = ratio
        first, *later = self._windows
        for window in later:
            first = first.joined(window)
        return Finding(rank=rank, kind=kind, ratio=ratio, reason=first.reason(rank))


def median_of_others(values: Floats) -> Floats:
    """Returns for each of at least two values the median of the others."""
    order = np.argsort(values)
    place = np.empty_like(order)
    place[order] = np.arange(len(values))
    ordered, others = values[order], len(values) - 1

    def among_others(index: int) -> Floats:
        return np.where(index < place, ordered[index], ordered[index + 1])

    return (among_others((others - 1) // 2) + among_others(others // 2)) / 2


class _CpuTimer:
    """The mean duration of some modules' calls."""

    def __init__(self) -> None:
        self._begun = self._seconds = 0.0
        self._calls = 0

    def begin(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def end(self, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._begun
        self._calls += 1

    def take(self) -> float:
        """Returns the mean of the calls since it was called last; 0 where there were none."""
        mean = self._seconds / max(1, self._calls)
        self._seconds, self._calls = 0.0, 0
        return mean


class _CudaTimer:
    """The same on a CUDA device, without synchronising.

    The host reads a step's figures after its backward pass, so the events of its forward pass are
    complete when they are read.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._open: torch.cuda.Event | None = None

    def begin(self, *_: Any) -> None:
        if len(self._pairs) < MAX_TIMED_CALLS:
            self._open = torch.cuda.Event(enable_timing=True)
            self._open.record()

    def end(self, *_: Any) -> None:
        if self._open is not None:
            closing = torch.cuda.Event(enable_timing=True)
            closing.record()
            self._pairs.append((self._open, closing))
            self._open = None

    def take(self) -> float:
        """Returns the mean of the calls since it was called last; 0 where none has ended."""
        ended: list[float] = [begin.elapsed_time(end) for begin, end in self._pairs if end.query()]
        self._pairs = []
        return sum(ended) / 1e3 / max(1, len(ended))
