"""Signals to the driver that request a stop."""

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

from data_pipeline.commands.stops import INSISTENT, detach_terminal, signals_handled, stop_signals
from moetrain.exit_codes import FAILED, STOPPED

SAME_STOP_SECONDS = 1.0


class StopRequest:
    """The first signal requests a stop after a checkpoint; a second SIGTERM or Ctrl-C ends at once.

    Signals within a second are the same stop: Ray, Slurm and terminals signal every process of a
    job, and a parent among them forwards the signal. SIGUSR1 and SIGHUP only warn: the SIGTERM
    after one is the first.
    """

    def __init__(self, *, on_stop: Callable[[], None] = lambda: None) -> None:
        self._event = threading.Event()
        self._told = on_stop
        self._asked_at = math.inf

    def __call__(self) -> bool:
        """Returns whether a stop was requested."""
        return self._event.is_set()

    def on_signals(self) -> AbstractContextManager[None]:
        """Handles the signals within the context."""

        def handle(signum: int, _: FrameType | None) -> None:
            detach_terminal(signum)
            if signum in INSISTENT:
                if time.monotonic() - self._asked_at > SAME_STOP_SECONDS:
                    os._exit(FAILED)  # Ray's processes, if any, end with this one
                self._asked_at = min(self._asked_at, time.monotonic())
            if not self._event.is_set():
                self._event.set()
                self._told()

        return signals_handled(stop_signals(), handle)


def stops_at_once() -> AbstractContextManager[None]:
    """Within the context, a signal ends the command as a stop; the same command starts over.

    Reports all signals but Ctrl-C, which the caller reports.
    """

    def handle(signum: int, _: object) -> NoReturn:
        detach_terminal(signum)
        print("moetrain: stopped, with nothing of a run begun", file=sys.stderr)
        raise SystemExit(STOPPED)

    return signals_handled((s for s in stop_signals() if s != signal.SIGINT), handle)
