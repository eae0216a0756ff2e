"""Real gloo ranks for a test: `run_ranks(function, world_size, ...)`."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, TypeVarTuple, overload

import pytest
import torch
import torch.distributed as dist

from moetrain.parallel import join_ranks

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

# A server that has imported torch once and forks ranks from a single-threaded state: forking
# pytest itself would copy the locks of its thread pools.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "moetrain.parallel", "moetrain.config"])


@overload
def run_ranks(
    function: Callable[[*Arguments], Result],
    world_size: int,
    *arguments: *Arguments,
    timeout: float = 120,
) -> list[Result]: ...


@overload
def run_ranks(
    function: Callable[[*Arguments], Result],
    world_size: int,
    *arguments: *Arguments,
    timeout: float = 120,
    may_be_lost: int,
) -> list[Result | None]: ...


def run_ranks(
    function: Callable[[*Arguments], Result],
    world_size: int,
    *arguments: *Arguments,
    timeout: float = 120,
    may_be_lost: int | None = None,
) -> Any:
    """Runs `function(*arguments)` as each of `world_size` gloo ranks; returns what each returned.

    The function and its results must pickle. A rank that raises or dies fails the test with
    its traceback, and the others are ended. `may_be_lost` is a rank that needn't answer, or live.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        ends: list[Connection] = []
        processes = []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(
                target=_rank, args=(theirs, rank, world_size, rendezvous, function, arguments)
            )
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
        try:
            return _collect(ends, timeout=timeout, may_be_lost=may_be_lost)
        finally:
            for process in processes:
                process.kill()
                process.join()


def replace_in_rank(owner: object, name: str, value: object) -> None:
    """Replaces what this rank finds under a name, which must be there.

    Nothing puts it back: the rank's process ends with the test.
    """
    pytest.MonkeyPatch().setattr(owner, name, value)


def world_group() -> dist.ProcessGroup:
    """Returns the group of all ranks, which `run_ranks` has made."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _collect(ends: list[Connection], *, timeout: float, may_be_lost: int | None) -> list[Any]:
    results: dict[int, Any] = {} if may_be_lost is None else {may_be_lost: None}
    while len(results) < len(ends):
        pending = [end for rank, end in enumerate(ends) if rank not in results]
        ready = wait(pending, timeout=timeout)
        assert ready, f"no rank answered within {timeout} s; done: {sorted(results)}"
        for end in [end for end in pending if end in ready]:
            rank = ends.index(end)
            try:
                failure, results[rank] = end.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without an answer") from None
            assert failure is None, f"rank {rank} failed:\n{failure}"
    return [results[rank] for rank in range(len(ends))]


def _rank(
    answer: Connection,
    rank: int,
    world_size: int,
    rendezvous: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        join_ranks(
            rank=rank,
            world_size=world_size,
            rendezvous=rendezvous,
            device=torch.device("cpu"),
            timeout_seconds=60,
        )
        answer.send((None, function(*arguments)))
        dist.barrier()
    except BaseException:
        answer.send((traceback.format_exc(), None))
    os._exit(0)  # tearing gloo down now and then aborts after success
