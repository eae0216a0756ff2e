"""events.jsonl: what happened to a run, when and why.

Owns one line for each start, save, failure, restart and stop, and the two times of each. The driver
and the ranks all append to the same file. Leaves naming an event and its reason to the caller, and
the account of time to ledger.py.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from moetrain.kinds import EventKind
from moetrain.observe.json_lines import append_line, read_lines
from moetrain.redaction import redacted

logger = logging.getLogger(__name__)

LIFE = (EventKind.start, EventKind.finish, EventKind.stop, EventKind.fail)
"""How a command's part of a run begins, and how it ends."""


class EventLog:
    """Appends events from any number of processes on one machine, whole lines only."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def write(self, kind: EventKind, *, reason: str | None = None, **fields: Any) -> None:
        """Append `{"time", "event", "reason", **fields, "clock"}`, without the secrets in them.

        Never raises for the disk's sake: an event is often written while something worse is being
        handled, and a full disk must not hide that.
        """
        now = times()
        record = {"time": now.pop("time"), "event": kind, "reason": reason} | fields | now
        try:
            append_line(self.path, redacted(record))
        except OSError as error:
            logger.warning("event '%s' not recorded: %s", kind, error)


def read_events(path: Path | str) -> list[dict[str, Any]]:
    """All events in the order in which they were written."""
    return [record for _, record in read_lines(Path(path))]


def has_finished(events: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether the newest command on a run ended with all of its steps done."""
    life = [event["event"] for event in events if event.get("event") in LIFE]
    return life[-1:] == [EventKind.finish]


def model_event(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the model's size from the newest start; empty for an older run."""
    return next((e for e in reversed(events) if e.get("event") == EventKind.model), {})


def baselines_by_source(events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the baselines of each source's held-out text, from the newest start.

    By the names of `data_pipeline.Baselines`; unknown ones are left out.
    """
    found: dict[str, dict[str, float]] = {}
    for event in events:
        baselines = event.get("baselines")
        if event.get("event") == EventKind.data and isinstance(baselines, dict):
            found[str(event.get("source"))] = {
                str(name): float(value)
                for name, value in baselines.items()
                if isinstance(value, (int, float))
            }
    return found


def timestamps(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns the time of each event in seconds since the first, never before its predecessor.

    Events of one boot of one machine are as far apart as their `clock` says. The date counts only
    for the first event of another boot, and without a clock. Machines with different dates are
    aligned by the order of their events: those of the driver's machine, which started the attempt,
    are fixed. A heartbeat (`sign`) may be placed later than it was written.
    """
    found: list[float] = []
    begins: dict[str, float] = {}  # when each boot's clock would have been 0
    driver, fast = None, 0  # the driver's boot, and its newest event
    dated: tuple[float, float] | None = None  # the newest event that has a date, and its date
    for number, event in enumerate(events):
        last, newest = (found[-1], _clock(events[number - 1])[0]) if found else (0.0, None)
        (boot, seconds), date = _clock(event), _date(event)
        if boot in begins:
            moment = begins[boot] + seconds
            if moment < last and boot == driver and found[fast] < last:
                # Another machine's date was ahead: its events were placed too late.
                late = last - max(moment, found[fast])
                found[fast + 1 :] = [max(found[fast], m - late) for m in found[fast + 1 :]]
                for other in {_clock(e)[0] for e in events[fast + 1 : number]} - {None, driver}:
                    begins[str(other)] -= late
                last = found[-1]
            elif (
                moment < last
                and boot not in (driver, newest)
                and event.get("event") != EventKind.sign
            ):
                begins[boot] += last - moment  # its date was behind
            moment = max(moment, last)
        else:
            moment = max(last, dated[0] + date - dated[1]) if dated and date is not None else last
            if boot is not None:
                begins[boot] = moment - seconds
        found.append(moment)
        if date is not None and event.get("event") != EventKind.sign:
            dated = (moment, date)
        if number == 0 or event.get("event") == EventKind.start:
            driver = boot
        if boot == driver:
            fast = number
    return found


def times() -> dict[str, Any]:
    """Returns the current time: `time`, for people, and `clock`, which nobody can set.

    `clock` is a boot of a machine and the seconds for which the machine was awake since: two of the
    same boot can be compared, between processes and across changes of the machine's date. It is
    left out if the system doesn't name its boots.
    """
    now: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
    return now | ({"clock": [boot, round(time.monotonic(), 3)]} if (boot := _boot()) else {})


@cache
def _boot() -> str | None:
    """Returns a name for this boot of this machine, on Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8] or None
    except OSError:
        return None


def _clock(event: Mapping[str, Any]) -> tuple[str | None, float]:
    """Returns an event's boot and the seconds since; no boot if the event has none."""
    match event.get("clock"):
        case [str(boot), int() | float() as seconds]:
            return boot, seconds
    return None, 0.0


def _date(event: Mapping[str, Any]) -> float | None:
    try:
        return datetime.fromisoformat(str(event.get("time"))).timestamp()
    except ValueError:
        return None
