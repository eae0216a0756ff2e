"""Communication between a training rank and its launcher."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moetrain.observe import EXPERT_LOAD, Record, Sink, numbers_of
from moetrain.parallel import Activity


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """One rank's place in one attempt of a run."""

    rank: int
    world_size: int
    device_index: int = 0
    """The index of the rank's CUDA device among those that this process sees."""
    local_world_size: int = 1
    """Ranks on this rank's machine, which share its cores."""
    rendezvous: str
    """The rendezvous address of this attempt, as torch's `init_method`."""
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank's training ended, if not by an exception."""

    finished: bool
    """Whether all steps are done; else it stopped on request, after saving."""
    step: int
    last: Mapping[str, Any]
    """The newest metric record; empty where no step was taken."""


@dataclass
class Control:
    """One rank's channel to its launcher; thread-safe.

    The rank reports its activity and publishes metric records; the launcher reads both, and can
    request a stop at the next step.
    """

    _stop: threading.Event = field(default_factory=threading.Event)
    _move: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _published: list[tuple[str, Any]] = field(default_factory=list)
    _asked: float = field(default_factory=time.monotonic)
    activity: Activity = field(default_factory=Activity)
    """What the rank is doing; its heartbeats."""

    def request_stop(self) -> None:
        """Requests the run to save and stop after the current step."""
        self._stop.set()

    def request_move(self, wanted: bool = True) -> None:
        """Requests a stop once the next regular checkpoint is saved, or cancels the request."""
        if wanted:
            self._move.set()
        else:
            self._move.clear()

    @property
    def move_requested(self) -> bool:
        """Whether a stop at the next checkpoint was requested."""
        return self._move.is_set()

    @property
    def stop_requested(self) -> bool:
        """Whether a stop was requested."""
        return self._stop.is_set()

    def heartbeat(self, phase: str, step: int) -> None:
        """Reports what the rank is about to do."""
        self.activity.begin(phase, step=step)

    def keep_alive(self) -> None:
        """Sends a heartbeat during a long operation that makes progress."""
        self.activity.goes_on()

    def publish(self, kind: str, content: Any) -> None:
        """Sends something to the launcher: a metric `record`, or a text to `say`."""
        with self._lock:
            self._published.append((kind, content))

    def collect(self) -> dict[str, Any]:
        """Returns the rank's activity, seconds since its last heartbeat, and what it published.

        Also the seconds of its slowest recent step, None before there are enough. The call renews
        the rank's lease.
        """
        self._asked = time.monotonic()
        with self._lock:
            published, self._published = self._published, []
        doing, silent = self.activity.read()
        return {
            "doing": doing,
            "silent_seconds": silent,
            "slowest_step": self.activity.slowest_step(),
            "published": published,
        }

    def unasked_seconds(self) -> float:
        """Returns the seconds since the lease was last renewed, by `collect`."""
        return time.monotonic() - self._asked


class DisplaySink(Sink):
    """Sends the records to the launcher, which displays them."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def write(self, record: Record) -> None:
        """Publishes a record's numbers and its loads."""
        shown = numbers_of(record) | {k: v for k, v in record.items() if k == EXPERT_LOAD}
        self._control.publish("record", shown)


def collective_timeout(hang_timeout_seconds: float) -> float:
    """Returns the timeout of collectives.

    It is longer than the supervisor's hang timeout, because the supervisor can name the rank that
    hangs; a collective can name only itself.
    """
    return 1.5 * hang_timeout_seconds + 30.0
