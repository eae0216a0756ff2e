"""Attempts of a small real run: two gloo ranks in a process group of their own, to be killed.

Owns starting and ending ranks, and signals that a rank sends itself before a certain operation on
the checkpoint folder. Leaves the choice of that moment to others.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch

from moetrain.settings import Resolved
from moetrain.train.control import Control, Outcome, RankPlace
from moetrain.train.rank import run_rank

WORLD_SIZE = 2

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.torture.preload"])

# Events of Python's audit hooks that touch a folder, each raised before the operation.
_OPERATIONS = {
    "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir",
}  # fmt: skip

_STAGED = re.compile(r"staged_\d+_attempt_\d+")


@dataclass(frozen=True, kw_only=True)
class Ambush:
    """A signal that a rank sends itself before its n-th operation from the k-th save on."""

    rank: int
    save: int
    operation: int
    number: signal.Signals = signal.SIGKILL
    whole_group: bool = False
    note: Path
    """Gets a line that says which operation it was."""


class Attempt:
    """Ranks that run `function(*arguments)`, each as a part of one world."""

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        directory: Path | None = None,
        world_size: int = WORLD_SIZE,
        ambush: Ambush | None = None,
        log: Path | None = None,
    ) -> None:
        """`directory` is the folder of checkpoints that an ambush watches."""
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = f"file://{self._folder.name}/rendezvous"
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        self.pids: list[int] = []
        self._answers: list[tuple[bool, Any] | None] = [None] * world_size
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank,
                args=(
                    theirs, rank, world_size, rendezvous, self.pids[0] if self.pids else 0,
                    directory, ambush, log, function, arguments,
                ),
            )  # fmt: skip
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
            self.pids.append(ours.recv())

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def send(self, number: signal.Signals, *, rank: int | None = None) -> None:
        """Sends a signal to a rank; to the whole process group where none is named."""
        with contextlib.suppress(ProcessLookupError):
            if rank is None:
                os.killpg(self.pids[0], number)
            else:
                os.kill(self.pids[rank], number)

    def ended(self, *, within: float = 0.0) -> bool:
        """Returns whether all ranks have ended, waiting for up to `within` seconds."""
        until = time.monotonic() + within
        while running := [p.sentinel for p in self._processes if p.is_alive()]:
            self._collect()
            if (left := until - time.monotonic()) <= 0:
                return False
            wait_for(running, timeout=min(left, 0.05))
        self._collect()
        return True

    def any_ended(self) -> bool:
        """Returns whether some rank has ended."""
        return not all(process.is_alive() for process in self._processes)

    def answers(self) -> list[tuple[bool, Any] | None]:
        """Returns of each rank whether it succeeded and what it returned, or its traceback.

        None represents a rank that died without an answer.
        """
        self._collect()
        return self._answers

    def result(self, *, within: float) -> Any:
        """Returns what the first rank returned; raises AssertionError where any rank failed."""
        assert self.ended(within=within), f"not at an end within {within} s"
        for rank, answer in enumerate(self.answers()):
            assert answer is not None, f"rank {rank} died without an answer"
            assert answer[0], f"rank {rank} failed:\n{answer[1]}"
        first = self._answers[0]
        return first and first[1]

    def _collect(self) -> None:
        for rank, end in enumerate(self._ends):
            with contextlib.suppress(EOFError, OSError):
                if self._answers[rank] is None and end.poll():
                    self._answers[rank] = end.recv()


def train(config: Resolved, number: int) -> Outcome:
    """Trains as one rank of an already joined world."""
    import torch.distributed as dist

    place = RankPlace(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_world_size=dist.get_world_size(),
        rendezvous="joined",
        attempt=number,
    )
    return run_rank(config, place, Control())


def _rank(
    answer: Connection,
    rank: int,
    world_size: int,
    rendezvous: str,
    group: int,
    directory: Path | None,
    ambush: Ambush | None,
    log: Path | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    with contextlib.suppress(OSError):  # rank 0 may be dead already
        os.setpgid(0, group)
    if log:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    answer.send(os.getpid())
    from moetrain.parallel import join_ranks

    torch.set_num_threads(1)
    try:
        join_ranks(
            rank=rank,
            world_size=world_size,
            rendezvous=rendezvous,
            device=torch.device("cpu"),
            timeout_seconds=60,
        )
        if ambush and directory and ambush.rank == rank:
            _lie_in_wait(ambush, directory)
        answer.send((True, function(*arguments)))
    except BaseException:
        answer.send((False, traceback.format_exc()))
    os._exit(0)  # tearing gloo down sometimes aborts after success


def on_each_operation(directory: Path, act: Callable[[str], None]) -> None:
    """Makes this process call `act` right before each operation on a folder's content, permanently.

    Python's own audit events are raised before operations: nothing of the code under test is
    replaced.
    """
    inside = f"{directory}/"

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _OPERATIONS and arguments:
            paths = " -> ".join(str(a) for a in arguments[:2] if isinstance(a, str | os.PathLike))
            # What rmtree removes has no path but its name.
            if paths.startswith(str(directory)) or event == "os.remove":
                act(f"{event} {paths.replace(inside, '')}")

    sys.addaudithook(before)


def _lie_in_wait(ambush: Ambush, directory: Path) -> None:
    """Makes this process send itself a signal right before an operation."""
    count = 0
    saves: set[str] = set()

    def inject(operation: str) -> None:
        nonlocal count
        saves.update(_STAGED.findall(operation))
        if len(saves) < ambush.save:
            return
        count += 1
        if count == ambush.operation:
            ambush.note.write_text(f"{operation}\n")
            if ambush.whole_group:
                os.killpg(0, ambush.number)
            os.kill(os.getpid(), ambush.number)

    on_each_operation(directory, inject)
