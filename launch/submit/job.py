"""Relays a job to a terminal: its log as it is written, a stop, its exit code.

Owns the meaning of a lost connection, a signal and a job's end. Leaves HTTP to `ray_jobs.py`.
"""

import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import TypeVar

from data_pipeline.commands.stops import INSISTENT, detach_terminal, signals_handled, stop_signals
from launch.submit.ray_jobs import JobRefused, JobState, JobsUnavailable, RayJobs
from moetrain.exit_codes import FAILED

POLL_SECONDS = 0.5
RETRY_SECONDS = 1.0
LOG_END_SECONDS = 10.0

_SAID_CODE = re.compile(r"^moetrain exit code (\d+)$", re.MULTILINE)
_SIGNALLED = 128  # a shell's offset for the number of the signal that ended a command

T = TypeVar("T")


def entrypoint(arguments: Sequence[str], *, python: str, folder: str | None) -> str:
    """Returns the shell command of a training job, in a folder of the head node or in Ray's copy.

    Ray keeps no exit code of a stopped job, and signals the shell as well as the command: so the
    shell waits for the command and prints its code.
    """
    # A `~` is the head node's home, so its shell expands it.
    home, slash, below = python.partition("/")
    program = f"{home}/{shlex.quote(below)}" if slash and home == "~" else shlex.quote(python)
    command = f"{program} {shlex.join(['-m', 'moetrain', *arguments])}"
    there = f"cd {shlex.quote(folder)} && " if folder else ""
    return f'trap : TERM; {there}{command}; code=$?; echo "moetrain exit code $code"; exit $code'


class JobUnreachable(Exception):
    """A job that can't be waited for any longer, with the reason."""


class JobWatch:
    """Waits for a job for the user at this terminal."""

    def __init__(self, jobs: RayJobs, job: str, *, give_up_seconds: float) -> None:
        self._jobs = jobs
        self._job = job
        self._give_up_seconds = give_up_seconds
        self._asked = 0
        self._shown = 0
        self._over = threading.Event()

    def wait(self) -> int:
        """Returns the job's exit code; raises JobUnreachable if the cluster stops answering.

        The first SIGTERM, Ctrl-C, SIGUSR1 or SIGHUP stops the job after a checkpoint, a second
        SIGTERM or Ctrl-C at once.
        """
        follower = threading.Thread(target=self._follow, name="log", daemon=True)
        told = 0
        with self._on_signals():
            follower.start()
            state = self._ask(lambda: self._jobs.state(self._job))
            while not state.ended:
                if told < self._asked:
                    told += self._stop(state, again=told > 0)
                time.sleep(POLL_SECONDS)
                state = self._ask(lambda: self._jobs.state(self._job))
        self._over.set()
        follower.join(timeout=LOG_END_SECONDS)
        return self._exit_code(state)

    def _stop(self, state: JobState, *, again: bool) -> int:
        """Forwards a stop; returns whether that was possible: a driver that hasn't started can't
        get it."""
        if not again:
            _say(f"stopping {self._job}: it checkpoints first; once more ends it at once")
            self._ask(lambda: self._jobs.stop(self._job))
            return 1
        if state.driver_pid is None:
            return 0
        _say(f"ending {self._job} at once")
        self._ask(lambda: self._jobs.signal_driver(state))
        return 1

    def _ask(self, question: Callable[[], T]) -> T:
        """Returns an answer of the cluster, retrying lost connections."""
        lost_at: float | None = None
        while True:
            try:
                answer = question()
            except JobsUnavailable as error:
                now = time.monotonic()
                if lost_at is None:
                    lost_at = now
                    _say(f"no connection to {self._jobs.address}, trying again: {error}")
                if now - lost_at > self._give_up_seconds:
                    raise JobUnreachable(
                        f"no connection to {self._jobs.address} for {now - lost_at:.0f} s; "
                        "the job may continue"
                    ) from error
                if self._asked > 1:
                    raise JobUnreachable("gave up waiting; the job may still run") from error
                time.sleep(RETRY_SECONDS)
            except JobRefused as error:
                raise JobUnreachable(
                    f"the cluster can't be asked for job {self._job}: {error}"
                ) from error
            else:
                if lost_at is not None:
                    _say(f"connected again after {time.monotonic() - lost_at:.0f} s")
                return answer

    def _follow(self) -> None:
        """Shows the log until the job ends; continues after a lost connection."""
        while True:
            skip = self._shown

            def show(text: str) -> None:
                nonlocal skip
                new = text[skip:]
                skip = max(0, skip - len(text))
                self._shown += len(new)
                sys.stdout.write(new)
                sys.stdout.flush()

            try:
                return self._jobs.follow(self._job, show)
            except Exception:  # the waiting thread reports the connection
                if self._over.wait(RETRY_SECONDS):
                    return

    def _exit_code(self, state: JobState) -> int:
        if state.exit_code is not None:
            code = state.exit_code
        elif state.stopped:
            said = _SAID_CODE.findall(self._ask(lambda: self._jobs.log(self._job)))
            if not said:
                _say(f"job {self._job} was stopped; Ray keeps no exit code of such a job")
            code = int(said[-1]) if said else FAILED
        else:
            _say(f"job {self._job} could not be run: {state.message}")
            code = FAILED
        return code if 0 <= code <= _SIGNALLED else FAILED

    def _on_signals(self) -> AbstractContextManager[None]:
        def handle(signum: int, _: FrameType | None) -> None:
            detach_terminal(signum)
            self._asked = self._asked + 1 if signum in INSISTENT else max(1, self._asked)

        return signals_handled(stop_signals(), handle)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
