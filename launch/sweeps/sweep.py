"""Runs the trials of a sweep, as many at once as a cluster has room for, and summarises them.

A trial is a command of its own, with its own supervisor, signals and exit code: a stop makes it
checkpoint, and its failure affects no other. Leaves composing to `moetrain.command`, and what a
trial does to that command.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from data_pipeline.commands.stops import INSISTENT, detach_terminal, signals_handled, stop_signals
from launch.closing import TRIAL_VARIABLE
from launch.sweeps.table import (
    Result,
    Trial,
    other_settings,
    result_of,
    write_table,
    write_trials,
)
from launch.sweeps.trial_server import TrialProcess, TrialServer
from moetrain.checkpoint.remote.of_run import good_save
from moetrain.exit_codes import BAD_CONFIGURATION, DONE, FAILED, STOPPED
from moetrain.observe import has_finished, read_events

POLL_SECONDS = 0.2
THREADS = "run.threads_per_rank="
_OF_A_TRIAL = {"PYTHONUNBUFFERED": "1", TRIAL_VARIABLE: "1"}  # added to the environment
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


@dataclass(kw_only=True)
class _Running:
    trial: Trial
    process: TrialProcess
    reader: threading.Thread | None


class ExternalLauncher(Protocol):
    """A third-party launcher (a Hydra plugin) that runs trials elsewhere."""

    @property
    def num_at_once(self) -> int:
        """How many trials run side by side on this machine; 0: they run on other machines."""

    @property
    def num_workers(self) -> int | None:
        """A trial's number of ranks, None if the launcher doesn't say."""

    def __call__(self, trials: Mapping[int, Trial], *, folder: Path) -> dict[int, int]:
        """Runs trials, each by its index in the batch; returns exit codes by their numbers."""


def run_sweep(
    trials: Sequence[Trial],
    *,
    folder: Path,
    places: int | None,
    compare: Callable[[Path], str | None] | None = None,
) -> int:
    """Runs all trials, prints their table and returns the exit code: 0 if all are done.

    `places` is the number of ranks that the cluster has room for; None: one trial after the other.
    The first SIGTERM, Ctrl-C, SIGUSR1 or SIGHUP stops every trial after a checkpoint, a second
    SIGTERM or Ctrl-C at once. `folder` gets the table, its rows as JSON, and the output of trials
    that ran side by side. `compare` returns what is to be printed of the comparison of its runs.
    """
    sweep = Sweep(folder=folder, places=places, num_trials=len(trials), compare=compare)
    sweep.run(trials)
    return sweep.close()


class Sweep:
    """A sweep's trials, all at once or batch by batch, and their table at the end."""

    def __init__(
        self,
        *,
        folder: Path,
        places: int | None,
        num_trials: int | None = None,
        compare: Callable[[Path], str | None] | None = None,
    ) -> None:
        self._folder = folder
        self._places = places
        self._num_trials = num_trials
        self._compare = compare
        self._results: dict[int, Result] = {}
        self._side_by_side = False
        self._running: list[_Running] = []
        self._stops = 0
        self._server = TrialServer()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop was requested."""
        return self._stops > 0

    def run(self, trials: Sequence[Trial]) -> list[Result]:
        """Runs a batch of trials, as many at once as there is room for."""
        self._name_trials(trials)
        codes = self._done_before(trials)
        waiting = [t for t in trials if t.number not in codes]
        smallest = sorted(trial.num_workers for trial in waiting)[:2]
        self._side_by_side = len(smallest) > 1 and sum(smallest) <= (self._places or 0)
        with self._on_signals():
            while self._running or (waiting and not self._stops):
                if not self._stops and (trial := next(filter(self._fits, waiting), None)):
                    waiting.remove(trial)
                    if other := other_settings(trial):  # another command started it since
                        self._say(f"{self._title(trial)} is another run by now ({other})")
                        codes[trial.number] = BAD_CONFIGURATION
                        continue
                    self._start(trial)
                    continue
                for one in [r for r in self._running if r.process.poll() is not None]:
                    codes[one.trial.number] = self._ended(one)
                time.sleep(POLL_SECONDS)
        return self._take(trials, codes)

    def run_with_launcher(
        self, trials: Sequence[Trial], elsewhere: ExternalLauncher
    ) -> list[Result]:
        """Runs a batch of trials with a third-party launcher."""
        self._name_trials(trials)
        codes = self._done_before(trials)
        waiting = {i: t for i, t in enumerate(trials) if t.number not in codes}
        for trial in waiting.values():
            self._say(self._title(trial))
        try:
            codes |= elsewhere(waiting, folder=self._folder) if waiting else {}
        except KeyboardInterrupt:
            self._stops += 1
            codes |= {t.number: STOPPED for t in waiting.values() if _has_begun(t)}
            told = (
                "stop" if elsewhere.num_at_once else "jobs continue in their queue: scancel stops"
            )
            self._say(f"stopped; {told} them after a checkpoint, and the same command resumes")
        except Exception as error:  # a launcher may raise anything for a lost job
            self._say(f"{type(error).__name__}: {error}")
            self._say("other jobs may still run; after them, the same command finds what is done")
        codes |= self._done_before(
            [t for t in waiting.values() if t.number not in codes], quietly=True
        )
        failed = {t.number: FAILED for t in waiting.values() if not self._stops}
        return self._take(trials, failed | codes)

    def close(self) -> int:
        """Prints the table of all trials and returns the exit code."""
        self._server.close()
        results = list(self._results.values())
        print(write_table(results, self._folder), flush=True)
        if self._compare is not None and (text := self._compare(self._folder)):
            print(f"\n{text}", flush=True)
        return _exit_code(results, stopped=self.is_stopped)

    def _name_trials(self, trials: Sequence[Trial]) -> None:
        """Writes which runs the sweep has: they are known while it runs, and after a kill."""
        begun = {trial.number: Result(trial=trial, exit_code=None) for trial in trials}
        write_trials(list((begun | self._results).values()), self._folder)

    def _take(self, trials: Sequence[Trial], codes: Mapping[int, int]) -> list[Result]:
        results = [result_of(trial, codes.get(trial.number)) for trial in trials]
        self._results |= {result.trial.number: result for result in results}
        return results

    def _done_before(self, trials: Sequence[Trial], *, quietly: bool = False) -> dict[int, int]:
        """Returns the exit codes of trials whose runs have all of their steps, by number."""
        codes = {}
        for trial in trials:
            if _is_done(trial):
                codes[trial.number] = DONE
                if not quietly:
                    self._say(f"{self._title(trial)}, done before")
        return codes

    def _fits(self, trial: Trial) -> bool:
        """Returns whether there is room; a trial too large for the whole cluster reports that
        itself."""
        taken = sum(one.trial.num_workers for one in self._running)
        return not self._running or taken + trial.num_workers <= (self._places or 0)

    def _start(self, trial: Trial) -> None:
        self._say(self._title(trial))
        command = list(trial.command)
        if self._side_by_side and not any(a.startswith(THREADS) for a in trial.command):
            command.append(f"{THREADS}1")  # each would use all cores
        reader, output = None, None
        if self._side_by_side:
            lines, output = os.pipe()
            log = (self._folder / f"trial_{trial.number}.log").open("w")
            reader = threading.Thread(target=_relay, args=(os.fdopen(lines), trial.number, log))
            reader.start()
        process = self._server.start(
            command,
            environ=os.environ | _OF_A_TRIAL,
            output=output,
            # Side by side each has its own process group, so that a terminal's Ctrl-C reaches it
            # only through the sweep.
            group=0 if self._side_by_side else os.getpgrp(),
        )
        if output is not None:
            os.close(output)
        self._running.append(_Running(trial=trial, process=process, reader=reader))
        if self._stops:  # a signal that arrived during its start
            process.send_signal(signal.SIGTERM)

    def _ended(self, one: _Running) -> int:
        self._running.remove(one)
        if one.reader:
            one.reader.join()
        assert one.process.returncode is not None
        return one.process.returncode

    def _on_signals(self) -> AbstractContextManager[None]:
        """Forwards a stop request to the trials within the context."""

        def handle(signum: int, _: FrameType | None) -> None:
            detach_terminal(signum)
            self._stops += 1
            for one in self._running:
                one.process.send_signal(signal.SIGTERM if signum in INSISTENT else signum)

        return signals_handled(stop_signals(), handle)

    def _title(self, trial: Trial) -> str:
        of = f" of {self._num_trials}" if self._num_trials else ""
        label = f"{trial.label} → " if trial.label else ""
        return f"trial {trial.number}{of}: {label}{trial.run_dir}"

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _is_done(trial: Trial) -> bool:
    if trial.wanted is None or trial.wanted.settings["checkpoint"]["upload_to"] is not None:
        return False  # it may need an upload or a download
    if not has_finished(read_events(trial.run_dir / "events.jsonl")):
        return False
    good = good_save(trial.run_dir / "checkpoints")
    return good is not None and good.step >= trial.wanted.settings["train"]["num_steps"]


def _has_begun(trial: Trial) -> bool:
    return (trial.run_dir / "events.jsonl").exists()


def run_trial(command: Sequence[str], *, log: str | None) -> int:
    """Runs a trial's command inside a third-party launcher's job; returns its exit code.

    Any exception that stops this process stops the trial, which checkpoints.
    """
    with ExitStack() as stack:
        output = stack.enter_context(open(log, "a")) if log else None
        process = subprocess.Popen(
            [sys.executable, "-m", "moetrain", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            env=os.environ | _OF_A_TRIAL,
            preexec_fn=_begin_in_job,
        )
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _begin_in_job() -> None:
    """Leaves the signals that submitit listens for to the process that does."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _stop_with_parent()


def _relay(lines: IO[str], number: int, log: IO[str]) -> None:
    """Prints a trial's output with its number before each line, and keeps it."""
    with lines, log:
        for line in lines:
            log.write(line)
            log.flush()
            sys.stderr.write(
                f"{number}| {line}"
            )  # one write for each line, so that lines don't mix


def _stop_with_parent() -> None:
    """Makes the kernel stop a trial, after a checkpoint, when the sweep is killed."""
    if sys.platform == "linux":
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


_LIBC = ctypes.CDLL(None)  # before any fork: loading it there could meet a lock


def _exit_code(results: Sequence[Result], *, stopped: bool) -> int:
    codes = [r.exit_code for r in results if r.exit_code is not None]
    if stopped or STOPPED in codes:
        return STOPPED
    return max((code if code >= 0 else FAILED for code in codes), default=FAILED)
