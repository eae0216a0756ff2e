"""Which of the ranks that ended is the cause, from what they wrote and in every order."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import ray

from launch.failure import Failure
from launch.on_ray.cluster import RayCluster, Worker, rank_log
from launch.placement import Node
from launch.supervision.attempt import Attempt
from launch.supervision.budget import Budget
from launch.supervision.cause import TAIL_BYTES, Ended, LogTails, cause_of
from launch.supervision.pulse import NodeWatch
from moetrain.kinds import FailureKind
from moetrain.observe import ProgressDisplay
from moetrain.settings import LaunchSettings
from moetrain.train.control import Control, Outcome

SUDDEN = Failure(
    kind=FailureKind.died, is_sudden=True, reason="its process ended suddenly: killed or crashed"
)
PEER = Failure(kind=FailureKind.peer, reason="RuntimeError: Connection closed by peer")

# After what torch, NCCL and gloo write, shortened.
WATCHDOG = """
[rank3]:[E ProcessGroupNCCL.cpp:688] [Rank 3] Watchdog caught collective operation timeout:
WorkNCCL(SeqNum=812, OpType=ALLTOALL_BASE, Timeout(ms)=930000) ran for 930041 milliseconds
[rank3]:[E ProcessGroupNCCL.cpp:2106] [PG ID 0 Rank 3] First PG on this rank to signal dumping.
terminate called after throwing an instance of 'c10::DistBackendError'
Fatal Python error: Aborted

Thread 0x00007f1 (most recent call first):
  File "/venv/torch/autograd/graph.py", line 865 in _engine_run_backward
"""
REMOTE = """
[rank1]:[E ProcessGroupNCCL.cpp:2068] [PG ID 0 Rank 1] Process group watchdog thread terminated with
exception: NCCL error: remote process exited or there was a network error, NCCL version 2.27.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting
socketProgress: Connection closed by remote peer node7<41234>
Fatal Python error: Aborted
"""
STORE = (
    "[W TCPStore.cpp:125] [c10d] recvValue failed on SocketImpl(fd=4): Connection reset by peer\n"
)
ECC = """
[rank2]:[E ProcessGroupNCCL.cpp:2068] [PG ID 0 Rank 2] Process group watchdog thread terminated with
exception: CUDA error: uncorrectable ECC error encountered
terminate called after throwing an instance of 'c10::DistBackendError'
Fatal Python error: Aborted
"""
MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
UNHANDLED = """
torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled cuda error
Last error: Cuda failure 'an illegal memory access was encountered'
"""
CRASH = "Fatal Python error: Segmentation fault\n"
THREAD = """
Exception in thread prefetch:
Traceback (most recent call last):
  File "/data.py", line 3, in run
    raise ValueError("a broken shard")
ValueError: a broken shard
"""
HANDLED = THREAD + "INFO: tried again, and it worked\n"
# What the loss of a peer does to a rank's own device afterwards.
AFTERWARDS = REMOTE + "CUDA error: unspecified launch failure\n"


def ended(rank: int, failure: Failure = SUDDEN, log: str = "", *, address: str = "") -> Ended:
    address = address or f"10.0.0.{rank}"
    return Ended(rank=rank, address=address, name=f"rank {rank}", failure=failure, log=log)


FOLLOWERS = [ended(0, log=WATCHDOG), ended(1, log=REMOTE), ended(3, log=STORE)]


@pytest.mark.parametrize(
    ("guilty", "kind", "said"),
    [
        (ended(2), "died", "ended suddenly"),
        (ended(2, log=ECC), "died", "uncorrectable ECC"),
        (ended(2, log=CRASH), "died", "Segmentation fault"),
        (ended(2, log=MEMORY), "memory", "out of memory"),
        (ended(2, log=THREAD), "died", "a broken shard"),
        (ended(2, log="NVRM: Xid (PCI:0000:07:00): 79\n"), "died", "Xid"),
        (ended(2, PEER, ECC), "died", "uncorrectable ECC"),
        (ended(2, PEER, UNHANDLED), "died", "unhandled cuda error"),
        (ended(2, Failure(kind=FailureKind.died, reason="CUDA error: x")), "died", "CUDA error"),
        (ended(2, Failure(kind=FailureKind.memory, reason="no memory")), "memory", "no memory"),
        (ended(2, Failure(kind=FailureKind.preempted, reason="taken")), "preempted", "taken"),
    ],
)
def test_the_cause_is_found_in_every_order_and_its_node_blamed(
    guilty: Ended, kind: str, said: str
) -> None:
    for order in permutations([guilty, *FOLLOWERS]):
        failure = cause_of(order)
        assert (failure.kind, failure.node) == (kind, "10.0.0.2")
        assert failure.reason.startswith("rank 2: ")
        assert said in failure.reason


@pytest.mark.parametrize(
    "reports",
    [
        FOLLOWERS,
        [*FOLLOWERS, ended(2, PEER)],
        [ended(0, log=AFTERWARDS), ended(1, log=HANDLED + REMOTE)],
        [ended(0, log=WATCHDOG + THREAD)],
    ],
)
def test_of_ranks_that_only_followed_no_node_is_blamed(reports: list[Ended]) -> None:
    for order in permutations(reports):
        failure = cause_of(order)
        assert (failure.kind, failure.node) == ("peer", None)
        budget = Budget(LaunchSettings(), saved_step=0, clock=lambda: 1.0)
        for _ in range(2):
            budget.count(failure, saved_step=0)
        assert not budget.left_out


def test_processes_that_end_without_a_word_on_several_nodes_blame_none() -> None:
    assert cause_of([ended(0), ended(1)]).node is None
    assert cause_of([ended(0, address="a"), ended(1, address="a"), *FOLLOWERS]).node == "a"
    assert cause_of([ended(0), ended(1, log=ECC), ended(3)]).node == "10.0.0.1", "one says why"


def test_an_error_of_the_users_blames_no_node() -> None:
    error = Failure(kind=FailureKind.error, reason="ValueError: a bug")
    for order in permutations([ended(2, error), *FOLLOWERS, ended(5)]):
        assert (cause_of(order).kind, cause_of(order).node) == ("error", None)


def test_only_what_this_attempt_wrote_is_read(tmp_path: Path) -> None:
    paths = {rank: tmp_path / f"{rank}.log" for rank in range(3)}
    paths[0].write_text(ECC)
    tails = LogTails(paths)
    assert tails.of(0) == ""
    with paths[0].open("a") as log:
        log.write("x" * 2 * TAIL_BYTES + REMOTE)
    assert tails.of(0).endswith(REMOTE)
    assert len(tails.of(0)) == TAIL_BYTES
    paths[1].write_bytes(b"\xff new")
    assert tails.of(1).endswith(" new")
    assert tails.of(2) == ""
    assert tails.of(9) == ""


class Rank:
    """A rank that aborts as NCCL's watchdog does, or is killed once another one is gone."""

    def __init__(self) -> None:
        self._control = Control()

    def pid(self) -> int:
        return os.getpid()

    def abort(self, log: str) -> Outcome:
        Path(log).write_text(REMOTE)
        os.abort()

    def be_killed_after(self, other: int) -> Outcome:
        while Path(f"/proc/{other}").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(finished=False, step=0, last={})

    def collect(self) -> dict[str, Any]:
        return self._control.collect()


@pytest.fixture
def local_ray() -> Iterator[RayCluster]:
    cluster = RayCluster.connect(None, num_workers=2)
    try:
        yield cluster
    finally:
        cluster.disconnect()


def test_a_rank_that_is_killed_is_the_cause_though_another_aborted_before(
    local_ray: RayCluster, tmp_path: Path
) -> None:
    """Real processes: the aborted one is seen first, and its log says that it only followed."""
    actor_class: Any = ray.remote(Rank)
    actors = [actor_class.options(max_concurrency=2, num_cpus=0).remote() for _ in range(2)]
    pids = ray.get([actor.pid.remote() for actor in actors])
    workers = [
        Worker(
            rank=rank, actor=actor, pid=pid, place=None,
            node=Node(id=str(rank), address=f"10.0.0.{rank}", room=1),
        )
        for rank, (actor, pid) in enumerate(zip(actors, pids, strict=True))
    ]  # fmt: skip
    logs = LogTails({rank: rank_log(tmp_path, rank) for rank in range(2)})
    running = {
        actors[1].abort.remote(str(rank_log(tmp_path, 1))): workers[1],
        actors[0].be_killed_after.remote(pids[1]): workers[0],
    }
    at_work = Attempt(
        running,
        nodes=NodeWatch(local_ray),
        own_node=local_ray.own_node,
        display=ProgressDisplay(mode="off", total_steps=1, run_name="tiny"),
        log_dir=tmp_path,
        logs=logs,
        hang_timeout_seconds=60,
        stop_requested=lambda: False,
        leaving=dict,
        may_grow=lambda: False,
    )
    ended = at_work.watch()
    assert isinstance(ended, Failure)
    assert (ended.kind, ended.node) == ("died", "10.0.0.0")
    assert ended.reason.startswith(
        f"rank 0 on 10.0.0.0 (pid {pids[0]}): its process ended suddenly"
    )


def test_an_abort_leaves_the_words_that_the_rules_read(tmp_path: Path) -> None:
    """A real process, as a rank's is set up: its stderr is the log, faulthandler writes there."""
    code = "import faulthandler, os; faulthandler.enable(); os.abort()"
    log = tmp_path / "log"
    with log.open("w") as file:
        subprocess.run([sys.executable, "-c", code], stderr=file, check=False)
    assert "Fatal Python error: Aborted" in log.read_text()
    assert cause_of([ended(0, log=log.read_text()), *FOLLOWERS]).node == "10.0.0.0"
