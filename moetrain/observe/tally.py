"""The running account of an attempt's time, on the rank that keeps the run's records.

Owns the sums, what a `save` event says of them, and the heartbeat from which the end of a killed
run is found later. Leaves the account to ledger.py.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.atomic_files import write_file
from moetrain.kinds import EventKind
from moetrain.observe.events import times
from moetrain.observe.ledger import Account, run_account

logger = logging.getLogger(__name__)

SIGN_OF_LIFE = "last_sign.json"  # in a run's folder
SIGN_EVERY_SECONDS = 10.0  # how much of a killed run's end isn't known


class Tally:
    """Seconds since the attempt's `training` event, by kind."""

    def __init__(self, run_dir: Path | None = None) -> None:
        """`run_dir` has the run's events and gets the heartbeat; None: neither is needed."""
        self._run_dir = run_dir
        self._begun = self._signed = time.monotonic()
        self._sums = {"saving": 0.0, "validation": 0.0}
        self._at: dict[int, dict[str, float]] = {}
        self._saving: tuple[int, float] | None = None
        self._attempt = 0
        self._earlier: Account | None = None

    def begin(self, attempt: int) -> None:
        """Begins at 0, right after the attempt's `training` event."""
        self._begun = time.monotonic()
        self._signed = self._begun - SIGN_EVERY_SECONDS  # the first step leaves one
        self._attempt = attempt
        self._earlier = None if self._run_dir is None else run_account(self._run_dir)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Counts the time inside as validation."""
        start = time.monotonic()
        yield
        self._sums["validation"] += time.monotonic() - start

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Counts the time inside as training waiting for the checkpoint of a step."""
        start = time.monotonic()
        # The newest two are enough: one save is in progress at a time.
        self._at = dict([*self._at.items(), (step, self.read())][-2:])
        self._saving = (step, start)
        yield
        self._saving = None
        took = time.monotonic() - start
        self._sums["saving"] += took
        self._at[step]["saving"] += took

    def read(self) -> dict[str, float]:
        """Returns the seconds that went to training, saving and validation so far."""
        rest = sum(self._sums.values())
        return {"training": time.monotonic() - self._begun - rest} | self._sums

    def at(self, step: int) -> dict[str, float] | None:
        """Returns what `read` returned when a step was about to be saved, with the save's own time.

        Callable from the thread that saves asynchronously. None if no such save began.
        """
        spent, saving = self._at.get(step), self._saving
        if spent is None:
            return None
        unfinished = time.monotonic() - saving[1] if saving and saving[0] == step else 0.0
        return _rounded(spent | {"saving": spent["saving"] + unfinished})

    def on_save(self, event: Callable[..., None]) -> Callable[..., None]:
        """Returns an event writer that adds the account to each `save`."""

        def write(kind: EventKind, **fields: Any) -> None:
            if kind == EventKind.save and (spent := self.at(fields["step"])):
                fields["spent"] = spent
            event(kind, **fields)

        return write

    def effective(self) -> float | None:
        """Returns the run's effective training time so far, if its account is known."""
        if self._earlier is None:
            return None
        spent = self.read()
        wall = self._earlier.wall + sum(spent.values())
        return (self._earlier.seconds["training"] + spent["training"]) / wall if wall else None

    def device_seconds(self, num_ranks: int) -> float | None:
        """Returns the device time of the run's steps so far, if its account is known."""
        if self._earlier is None or self._earlier.device_seconds is None:
            return None
        return self._earlier.device_seconds + num_ranks * self.read()["training"]

    def sign(self, step: int) -> None:
        """Writes a heartbeat, if the last one is some seconds old; never raises for the disk."""
        now = time.monotonic()
        if self._run_dir is None or now - self._signed < SIGN_EVERY_SECONDS:
            return
        self._signed = now
        sign = times() | {"attempt": self._attempt, "step": step, "spent": _rounded(self.read())}
        try:  # it may be lost with the machine
            write_file(self._run_dir / SIGN_OF_LIFE, json.dumps(sign) + "\n", durable=False)
        except OSError as error:
            logger.warning("no heartbeat written: %s", error)


def read_sign(run_dir: Path) -> dict[str, Any] | None:
    """Returns a run's last heartbeat; None if there is none, or none that can be read."""
    try:
        sign = json.loads((run_dir / SIGN_OF_LIFE).read_text())
    except (OSError, ValueError):
        return None
    return sign if isinstance(sign, dict) else None


def _rounded(spent: dict[str, float]) -> dict[str, float]:
    return {what: round(seconds, 3) for what, seconds in spent.items()}
