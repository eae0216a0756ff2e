"""What the supervisor decides when nodes join, leave and fail, on a simulated cluster.

Real nodes are in tests/cluster; these have what no machine here has: GPUs, or a broken device.
"""

import errno
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import ray

from launch.failure import ClusterError, Failure, RunFailed
from launch.on_ray.cluster import RayCluster, Worker
from launch.placement import Node, Share
from launch.supervision import attempt, supervisor
from launch.supervision.attempt import Attempt, Moved
from launch.supervision.cause import LogTails
from launch.supervision.pulse import NodeWatch
from launch.supervision.supervisor import Supervisor
from moetrain.checkpoint.remote.of_run import take_over
from moetrain.kinds import FailureKind
from moetrain.observe import ProgressDisplay
from moetrain.settings import (
    ModelSettings,
    Resolved,
    ResolvedCluster,
    ResolvedData,
    ResolvedLaunch,
    ResolvedParallel,
    ResolvedRun,
    ResolvedTrain,
)
from moetrain.train.control import Control, Outcome

A, B, C = (Node(id=name, address=f"10.0.0.{n}", room=1) for n, name in enumerate("abc", 1))

MODEL = ModelSettings(
    dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_hidden_dim=32,
    num_experts=4, top_k=2, vocab_size=256, max_seq_len=32, rope_theta=1e4,
)  # fmt: skip


class Agent:
    """A node's agent that always answers."""

    class ping:
        @staticmethod
        def remote() -> Any:
            return ray.put(None)


class Nodes:
    """A cluster whose nodes are given by the test."""

    own_node = "driver"

    def __init__(self, *nodes: Node, gpus: tuple[Node, ...] = (), gpus_join_at: int = 0) -> None:
        self.cpu, self.gpu, self._gpus_join_at = list(nodes), list(gpus), gpus_join_at
        self.leaving: dict[str, str] = {}
        self.requested: list[tuple[int, bool]] = []
        self._looks = 0

    def look(self) -> None:
        self._looks += 1

    def has_gpus(self) -> bool:
        return bool(self.gpu) and self._looks >= self._gpus_join_at

    def nodes(self, *, on_gpu: bool) -> list[Node]:
        return self.gpu if on_gpu and self.has_gpus() else [] if on_gpu else self.cpu

    def reserve(self, shares: list[Share], *, on_gpu: bool) -> bool:
        return True

    def request(self, num_ranks: int, *, on_gpu: bool) -> None:
        self.requested.append((num_ranks, on_gpu))

    def draining(self) -> dict[str, str]:
        return self.leaving

    def start_agent(self, node: Node, *, warnings: str) -> Any:
        return Agent()


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[RayCluster]:
    cluster = RayCluster.connect(None, num_workers=2)
    try:
        yield cluster
    finally:
        cluster.disconnect()


def display() -> ProgressDisplay:
    return ProgressDisplay(mode="off", total_steps=60, run_name="tiny")


def supervised(nodes: Nodes, folder: Path, *, device: str = "cpu", **launch: Any) -> Supervisor:
    (folder / "tiny").mkdir(exist_ok=True)
    config = Resolved(
        model=MODEL,
        train=ResolvedTrain(num_steps=60, seq_len=32, global_batch_size=12, micro_batch_size=4),
        run=ResolvedRun(dir=str(folder), name="tiny", device=device),
        parallel=ResolvedParallel(expert_degree=1, data_shard_degree=3),
        data=ResolvedData(dir="shards"),
        launch=ResolvedLaunch(num_workers=3, **launch),
        cluster=ResolvedCluster(gpus_per_node=8),
    )
    return Supervisor(
        config,
        cast(RayCluster, nodes),  # it stands in for what a supervisor asks of a cluster
        refit=lambda num_ranks: replace(
            config, launch=replace(config.launch, num_workers=num_ranks)
        ),
        display=display(),
        stop_requested=lambda: False,
    )


def placed(found: tuple[Resolved, list[Share]] | None) -> list[str]:
    assert found is not None
    return [share.node.id for share in found[1] for _ in range(share.num_ranks)]


def died(node: Node, *, kind: FailureKind = FailureKind.died, step: int | None = None) -> Failure:
    return Failure(kind=kind, reason="gone", step=step, node=node.address)


class TestDevice:
    G = Node(id="g", address="10.0.1.1", room=8)

    def test_gpus_that_join_while_a_run_waits_are_what_it_runs_on(self, tmp_path: Path) -> None:
        nodes = Nodes(A, gpus=(self.G,), gpus_join_at=3)
        run = supervised(nodes, tmp_path, device="auto", wait_for_nodes_seconds=60)
        assert placed(run._find_place(resuming=False)) == ["g", "g", "g"]
        assert nodes.requested == [(3, False), (3, False), (0, True)]

    def test_a_run_that_waits_for_gpus_asks_an_autoscaler_for_those(self, tmp_path: Path) -> None:
        nodes = Nodes(A, B, C)
        run = supervised(nodes, tmp_path, device="cuda", wait_for_nodes_seconds=1)
        with pytest.raises(ClusterError, match="each rank needs a free GPU"):
            run._find_place(resuming=False)
        assert set(nodes.requested) == {(3, True)}

    def test_a_run_stays_on_what_it_began_on(self, tmp_path: Path) -> None:
        nodes = Nodes(A, B, C, gpus=(self.G,), gpus_join_at=2)
        run = supervised(nodes, tmp_path, device="auto")
        assert placed(run._find_place(resuming=False)) == ["a", "b", "c"]
        assert placed(run._find_place(resuming=True)) == ["a", "b", "c"]
        assert nodes.has_gpus()


class TestFailures:
    def test_an_elastic_run_goes_on_without_a_node_on_which_every_rank_dies(
        self, tmp_path: Path
    ) -> None:
        run = supervised(Nodes(A, B, C), tmp_path, elastic=True)
        assert placed(run._find_place(resuming=False)) == ["a", "b", "c"]
        for _ in range(2):
            assert run._recover(died(C)).kind == "died"
        assert placed(run._find_place(resuming=True)) == ["a", "b"]
        assert not run._may_grow(2), "the bad node is no room"

    @pytest.mark.parametrize("kind", [FailureKind.died, FailureKind.lost, FailureKind.hung])
    def test_what_becomes_of_a_node_that_will_be_taken_away_is_no_failure(
        self, tmp_path: Path, kind: FailureKind
    ) -> None:
        nodes = Nodes(A, B, C)
        run = supervised(nodes, tmp_path, max_failures=0)
        run._find_place(resuming=False)
        nodes.leaving = {"c": "Ray drains it"}
        assert run._recover(died(C, kind=kind)).kind == "preempted"
        with pytest.raises(RunFailed, match="1 failures"):
            run._recover(died(B, kind=kind))


class TestTakingOver:
    def test_a_file_system_that_fails_for_a_moment_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = supervised(Nodes(A, B, C), tmp_path)
        hiccups = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "I/O error")]

        def hesitate(*arguments: Any, **others: Any) -> int:
            if hiccups:
                raise hiccups.pop()
            return take_over(*arguments, **others)

        monkeypatch.setattr(supervisor, "take_over", hesitate)
        assert run._take_over(may_be_alone=False) == 1
        assert not hiccups

    def test_what_does_not_pass_is_told_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, tries = supervised(Nodes(A, B, C), tmp_path), []

        def fail(*_: Any, **__: Any) -> int:
            tries.append(1)
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(supervisor, "take_over", fail)
        with pytest.raises(OSError, match="Read-only"):
            run._take_over(may_be_alone=False)
        assert len(tries) == 1


class Rank:
    """Ends because it was told to move, but only when that is taken back: it was ending already."""

    def __init__(self) -> None:
        self._control = Control()

    def run(self) -> Outcome:
        for wanted in (True, False):
            while self._control.move_requested != wanted:
                time.sleep(0.02)
        return Outcome(finished=False, step=20, last={})

    def move(self, wanted: bool) -> None:
        self._control.request_move(wanted)

    def is_told_to_move(self) -> bool:
        return self._control.move_requested

    def collect(self) -> dict[str, Any]:
        return self._control.collect()


def test_a_move_that_is_called_off_too_late_is_a_move(
    local_ray: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "CLUSTER_LOOK_SECONDS", 0.1)
    actor_class: Any = ray.remote(Rank)
    actor = actor_class.options(max_concurrency=3, num_cpus=0).remote()
    place = Node(id="here", address="127.0.0.1", room=1)
    worker = Worker(rank=0, actor=actor, node=place, pid=0, place=None)
    at_work = Attempt(
        {actor.run.remote(): worker},
        nodes=NodeWatch(local_ray),
        own_node=local_ray.own_node,
        display=display(),
        log_dir=tmp_path,
        logs=LogTails({}),
        hang_timeout_seconds=60,
        stop_requested=lambda: False,
        leaving=dict,
        may_grow=lambda: not ray.get(actor.is_told_to_move.remote()),
    )
    assert at_work.watch() == Moved(
        reason="there is room for a larger layout again", step=20, forced=False, ends=False
    )
