"""Signals to the driver: how a run is asked to stop."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import NoReturn

from data_pipeline.commands.stops import INSISTENT, leave_terminal, signals_handled, stop_signals
from moetrain.exit_codes import FAILED, STOPPED

SAME_STOP_SECONDS = 1.0


class StopRequest:
    """Signals: the first asks for a stop after saving, a second SIGTERM or Ctrl-C ends at once.

    What comes within a second is the same stop: Ray, Slurm and terminals signal every process of a
    job, and a parent among them passes on what it got. SIGUSR1 and SIGHUP warn and don't insist:
    the SIGTERM after one is the first.
    """

    def __init__(self, *, told: Callable[[], None] = lambda: None) -> None:
        self._event = threading.Event()
        self._told = told
        self._asked_at = math.inf

    def __call__(self) -> bool:
        """Returns whether a stop was asked for."""
        return self._event.is_set()

    def on_signals(self) -> AbstractContextManager[None]:
        """Listens to them while the context lasts."""

        def handle(signum: int, _: FrameType | None) -> None:
            leave_terminal(signum)
            if signum in INSISTENT:
                if time.monotonic() - self._asked_at > SAME_STOP_SECONDS:
                    os._exit(FAILED)  # Ray's processes, if any, end with this one
                self._asked_at = min(self._asked_at, time.monotonic())
            if not self._event.is_set():
                self._event.set()
                self._told()

        return signals_handled(stop_signals(), handle)


def stops_at_once() -> AbstractContextManager[None]:
    """While it lasts, a signal ends the command as a stop: the same one begins where this did.

    All but Ctrl-C, which whoever called this tells of.
    """

    def handle(signum: int, _: object) -> NoReturn:
        leave_terminal(signum)
        print("moetrain: stopped, with nothing of a run begun", file=sys.stderr)
        raise SystemExit(STOPPED)

    return signals_handled((s for s in stop_signals() if s != signal.SIGINT), handle)
