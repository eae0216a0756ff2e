"""The signals that request a stop, after which the same command resumes."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INSISTENT = (signal.SIGTERM, signal.SIGINT)
"""Sent twice, they end a command at once."""

_WARNINGS = (signal.SIGUSR1, signal.SIGHUP)


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that request a stop: SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP.

    `sbatch --signal=USR1@90` sends SIGUSR1 before the time limit, a closed terminal sends SIGHUP. A
    signal that this process was started to ignore, as by `nohup`, stays ignored.
    """
    heard = [s for s in _WARNINGS if signal.getsignal(s) is not signal.SIG_IGN]
    return [*INSISTENT, *heard]


@contextmanager
def signals_handled(
    signums: Iterable[int], handle: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Handles some signals with `handle` within the context, then restores the previous
    handlers."""
    before = {signum: signal.signal(signum, handle) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def detach_terminal(signum: int) -> None:
    """After SIGHUP, discards further output to a terminal: a closed one accepts none."""
    if signum != signal.SIGHUP:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # no stream, or one without a file
            if _is_terminal(stream.fileno()):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _is_terminal(descriptor: int) -> bool:
    try:
        os.ttyname(descriptor)
    except OSError as error:
        return error.errno == errno.EIO  # it was a terminal
    return True
