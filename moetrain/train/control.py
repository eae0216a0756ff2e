"""What passes between a rank that trains and whoever launched it."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moetrain.observe import EXPERT_LOAD, Record, Sink, numbers_of
from moetrain.parallel import Activity


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where one rank stands in one attempt of a run."""

    rank: int
    world_size: int
    device_index: int = 0
    """Which of the CUDA devices that this process sees is the rank's."""
    local_world_size: int = 1
    """Ranks on this rank's machine, which share its cores."""
    rendezvous: str
    """Where the ranks of this attempt find each other, as torch's `init_method`."""
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank's training ended, if not by an exception."""

    finished: bool
    """All steps are done; else it stopped on request, after saving."""
    step: int
    last: Mapping[str, Any]
    """The newest metric record; empty where no step was taken."""


@dataclass
class Control:
    """One rank's line to its launcher; safe to use from several threads.

    The rank says what it does and publishes metric records; the launcher reads both, and asks
    the rank to stop at the next step.
    """

    _stop: threading.Event = field(default_factory=threading.Event)
    _move: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _published: list[tuple[str, Any]] = field(default_factory=list)
    _asked: float = field(default_factory=time.monotonic)
    activity: Activity = field(default_factory=Activity)
    """What the rank is doing; its signs of life."""

    def request_stop(self) -> None:
        """Asks the run to save and stop after the step that it is in."""
        self._stop.set()

    def request_move(self, wanted: bool = True) -> None:
        """Asks the run to stop once its next regular checkpoint is saved, or no longer to."""
        if wanted:
            self._move.set()
        else:
            self._move.clear()

    @property
    def move_requested(self) -> bool:
        """Whether somebody asked for a stop at the next checkpoint."""
        return self._move.is_set()

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked for a stop."""
        return self._stop.is_set()

    def heartbeat(self, phase: str, step: int) -> None:
        """Says what the rank is about to do."""
        self.activity.begin(phase, step=step)

    def keep_alive(self) -> None:
        """Sends a heartbeat in the middle of something long that gets on."""
        self.activity.goes_on()

    def publish(self, kind: str, content: Any) -> None:
        """Hands something to the launcher: a metric `record`, or a text to `say`."""
        with self._lock:
            self._published.append((kind, content))

    def collect(self) -> dict[str, Any]:
        """Returns what the rank does, seconds since its last heartbeat, and what it published.

        With it the seconds of the slowest of its last steps, None before it took enough. Being
        asked renews the rank's lease.
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
        """Returns for how long nobody has asked: a lease that wasn't renewed."""
        return time.monotonic() - self._asked


class DisplaySink(Sink):
    """Hands the records to the launcher, which shows them."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def write(self, record: Record) -> None:
        """Publishes a record's numbers and its loads."""
        shown = numbers_of(record) | {k: v for k, v in record.items() if k == EXPERT_LOAD}
        self._control.publish("record", shown)


def collective_timeout(hang_timeout_seconds: float) -> float:
    """Returns the time after which a collective gives up.

    Longer than the supervisor's hang timeout, which names the rank that hangs; a collective names
    only itself.
    """
    return 1.5 * hang_timeout_seconds + 30.0
