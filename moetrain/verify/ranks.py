"""Starts gloo ranks on this machine, and returns their results or the cause of a failure.

A rank is ended when its layout is done, when another rank fails, and when this process ends, in
whatever way: none is left behind.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moetrain.checks import ConfigError
from moetrain.parallel import join_ranks

GRACE_SECONDS = 2.0  # for the rank whose failure is the cause to say so, where peers see it first
LAST_WORDS = 2000  # characters of a dead rank's output to show

Tell = Callable[[int], None]
"""Says which step a rank is about to take."""


class RankFailed(Exception):
    """A rank that raised, died or hung; the message holds its traceback or last words."""


@dataclass
class _Rank:
    number: int
    process: BaseProcess
    line: Connection
    log: Path
    result: Any = None
    failure: str | None = None
    lost_a_peer: bool = False
    answered: bool = field(default=False)


def run_ranks(
    function: Callable[[Any, Tell], Any],
    argument: Any,
    *,
    num_ranks: int,
    num_threads: int = 1,
    timeout_seconds: float,
    on_step: Callable[[int], None] = lambda _: None,
) -> list[Any]:
    """Returns what `function(argument, tell)` returned as each of `num_ranks` gloo ranks.

    Function, argument and results must pickle. Raises RankFailed with the cause of the failure
    of any, or the ConfigError that a rank raised. `on_step` receives the steps of rank 0. Each
    rank computes with `num_threads`.
    """
    # Ranks are forked from a server that has imported torch once and started no thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moetrain.verify.trial"])
    with tempfile.TemporaryDirectory(
        prefix="moetrain-ranks-", ignore_cleanup_errors=True
    ) as folder:
        ranks: list[_Rank] = []
        try:
            for number in range(num_ranks):
                ours, theirs = context.Pipe(duplex=False)
                log = Path(folder, f"rank_{number}.log")
                place = (number, num_ranks, f"file://{folder}/rendezvous", timeout_seconds)
                arguments = (theirs, str(log), place, num_threads, function, argument)
                process = context.Process(target=_live, args=arguments)
                process.start()
                theirs.close()
                ranks.append(_Rank(number, process, ours, log))
            _hear(ranks, timeout_seconds=timeout_seconds, on_step=on_step)
            return [rank.result for rank in ranks]
        finally:
            for rank in ranks:
                rank.process.kill()
            for rank in ranks:
                rank.process.join()


def _hear(ranks: list[_Rank], *, timeout_seconds: float, on_step: Callable[[int], None]) -> None:
    """Waits until every rank has answered; raises for the first failure's cause."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        waiting = {rank.line: rank for rank in ranks if not rank.answered}
        failed = [rank for rank in ranks if rank.failure]
        if not waiting or (failed and time.monotonic() > deadline):
            break
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready and not failed:
            raise RankFailed(_hang(list(waiting.values()), timeout_seconds))
        for line in ready:
            _take(waiting[line], on_step)  # type: ignore[index]
        if not failed and any(rank.failure for rank in ranks):
            deadline = time.monotonic() + GRACE_SECONDS
    if failed := [rank for rank in ranks if rank.failure]:
        # A rank that lost its peer is a symptom: the one that raised or died is the cause.
        cause = min(failed, key=lambda rank: rank.lost_a_peer)
        raise RankFailed(f"rank {cause.number} of {len(ranks)}: {cause.failure}")


def _take(rank: _Rank, on_step: Callable[[int], None]) -> None:
    try:
        kind, content = rank.line.recv()
    except EOFError:
        rank.process.join(GRACE_SECONDS)
        rank.answered, rank.failure = True, f"died without an answer{_last_words(rank)}"
        return
    if kind == "step":
        if rank.number == 0:
            on_step(content)
        return
    rank.answered = True
    if kind == "result":
        rank.result = content
    elif kind == "refused":
        raise content
    else:
        rank.failure, rank.lost_a_peer = content


def _last_words(rank: _Rank) -> str:
    code = rank.process.exitcode
    how = ""
    if code is not None and code < 0:
        how = f" (killed by {signal.Signals(-code).name}"
        how += "; out of memory?)" if -code == signal.SIGKILL else ")"
    said = ""
    with contextlib.suppress(OSError):
        said = rank.log.read_text(errors="replace")[-LAST_WORDS:].strip()
    return how + (f", and said last:\n{said}" if said else "")


def _hang(ranks: list[_Rank], seconds: float) -> str:
    numbers = ", ".join(str(rank.number) for rank in ranks)
    return (
        f"no answer from rank {numbers} within {seconds:.0f} s: it hangs, or is too slow "
        "(raise verify.timeout_seconds, or use a smaller train.global_batch_size or train.seq_len)"
    )


def _live(
    line: Connection,
    log: str,
    place: tuple[int, int, str, float],
    num_threads: int,
    function: Callable[[Any, Tell], Any],
    argument: Any,
) -> None:
    """What a rank's process runs; it answers once, and exits without tearing down gloo."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends all ranks
    _end_with_parent()
    output = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)  # gloo talks to standard output, where one JSON object may be expected
    os.dup2(output, 2)
    rank, num_ranks, rendezvous, timeout_seconds = place
    torch.set_num_threads(num_threads)
    try:
        join_ranks(
            rank=rank,
            world_size=num_ranks,
            rendezvous=rendezvous,
            device=torch.device("cpu"),
            timeout_seconds=timeout_seconds,
        )
        result = function(argument, lambda step: line.send(("step", step)))
        dist.barrier()
        line.send(("result", result))
    except ConfigError as error:
        line.send(("refused", error))
    except BaseException as error:
        lost = isinstance(error, dist.DistError) or "onnection" in str(error)
        line.send(("failed", (f"\n{traceback.format_exc().rstrip()}", lost)))
        time.sleep(GRACE_SECONDS)  # so that the cause is read before peers see this rank exit
    os._exit(0)  # tearing gloo down now and then aborts after success


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
