"""Ranks and nodes that answer, stall, are stopped, or die, as their supervisor sees them.

The processes are real ones of a Ray that is started here; ranks and agents do nothing but answer.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from launch.on_ray.cluster import RayCluster, Worker
from launch.placement import Node
from launch.supervision import pulse
from launch.supervision.pulse import UNRESPONSIVE, NodeWatch, Pulse
from moetrain.train.control import Control

HANG_SECONDS = 4.0
REPORT_SECONDS = 1.0
PATIENCE = HANG_SECONDS - REPORT_SECONDS
STEP_SECONDS = 0.05
NOBODY = "f" * 56  # the id of a node that no cluster has
DEADLINE_SECONDS = 60.0  # for what takes a second where nothing else runs


class AgentsKept(RayCluster):
    """A cluster whose agents the test can reach, and whose own node is watched like another."""

    agents: list[Any]

    def start_agent(self, node: Node, *, warnings: str) -> Any:
        agent = super().start_agent(node, warnings=warnings)
        self.agents.append(agent)
        return agent


class Rank:
    """Says what it is told to say."""

    def __init__(self) -> None:
        self._control = Control()

    def collect(self) -> dict[str, Any]:
        return self._control.collect()

    def heartbeat(self, phase: str, step: int) -> int:
        self._control.heartbeat(phase, step)
        return os.getpid()

    def train(self, steps: int) -> None:
        for step in range(steps):
            for phase in ("between steps", "forward", "optimizer"):
                self._control.heartbeat(phase, step)
                time.sleep(STEP_SECONDS / 3)
        self._control.heartbeat("between steps", steps)

    def publish(self, kind: str, content: str) -> None:
        self._control.publish(kind, content)


@pytest.fixture(scope="module")
def cluster() -> Iterator[AgentsKept]:
    found = AgentsKept.connect(None, num_workers=2)
    assert isinstance(found, AgentsKept)
    try:
        yield found
    finally:
        found.disconnect()


@pytest.fixture
def node(cluster: AgentsKept, monkeypatch: pytest.MonkeyPatch) -> Node:
    (entry,) = [n for n in ray.nodes() if n["Alive"]]
    cluster.agents = []
    monkeypatch.setattr(cluster, "own_node", NOBODY)
    return Node(id=entry["NodeID"], address=entry["NodeManagerAddress"], room=2)


@pytest.fixture
def ranks(cluster: AgentsKept, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Worker]]:
    monkeypatch.setattr(pulse, "REPORT_SECONDS", REPORT_SECONDS)
    actor_class: Any = ray.remote(Rank)
    actors = [actor_class.options(max_concurrency=2, num_cpus=0).remote() for _ in range(2)]
    pids = ray.get([actor.heartbeat.remote("starting", 0) for actor in actors])
    place = Node(id="here", address="127.0.0.1", room=2)
    yield [
        Worker(rank=rank, actor=actor, node=place, pid=pid, place=None)
        for rank, (actor, pid) in enumerate(zip(actors, pids, strict=True))
    ]
    for actor in actors:
        ray.kill(actor)


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def hear(pulse: Pulse) -> list[tuple[str, Any]]:
    """Takes twice: an answer that was asked for before may be of before."""
    shown: list[tuple[str, Any]] = []
    for _ in range(2):
        pulse.take(lambda kind, content: shown.append((kind, content)), wait_seconds=1.0)
    return shown


def listened(pulse: Pulse, seconds: float) -> None:
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        pulse.take(lambda *_: None)
        time.sleep(0.05)


def tell(worker: Worker, phase: str, step: int) -> None:
    ray.get(worker.actor.heartbeat.remote(phase, step))


class TestPulse:
    def test_what_ranks_do_is_known_and_what_they_publish_is_shown_once(
        self, ranks: list[Worker]
    ) -> None:
        heard = Pulse(ranks)
        hear(heard)
        assert heard.step is None, "nobody is in a step yet"
        tell(ranks[0], "forward", 7)
        tell(ranks[1], "optimizer", 6)
        ray.get(ranks[1].actor.publish.remote("say", "hello"))
        assert hear(heard) == [("say", "hello")]
        assert hear(heard) == []
        assert heard.step == 7
        assert str(heard.doing(1)) == "optimizer at step 6"

    def test_who_stands_still_is_told_from_who_goes_on(self, ranks: list[Worker]) -> None:
        heard = Pulse(ranks)
        tell(ranks[0], "forward", 3)
        began = time.monotonic()
        while not (silent := heard.silent(HANG_SECONDS)):
            tell(ranks[1], "forward", 3)
            listened(heard, 0.1)
        assert time.monotonic() - began > PATIENCE
        assert silent == {0: "makes no progress in forward at step 3"}
        tell(ranks[0], "forward", 4)
        listened(heard, 0.2)
        assert heard.silent(HANG_SECONDS) == {}

    def test_a_stopped_process_does_not_answer(self, ranks: list[Worker]) -> None:
        """And costs the others nothing: nobody waits for it."""
        heard = Pulse(ranks)
        tell(ranks[0], "backward", 5)
        hear(heard)
        os.kill(ranks[0].pid, signal.SIGSTOP)
        try:
            while not (silent := heard.silent(HANG_SECONDS)):
                tell(ranks[1], "backward", 5)
                began = time.monotonic()
                listened(heard, 0.1)
                assert time.monotonic() - began < PATIENCE
        finally:
            os.kill(ranks[0].pid, signal.SIGCONT)
        assert silent == {0: f"{UNRESPONSIVE} in backward at step 5"}

    def test_an_ended_process_is_left_to_its_own_result(self, ranks: list[Worker]) -> None:
        heard = Pulse(ranks)
        hear(heard)
        os.kill(ranks[0].pid, signal.SIGKILL)
        tell(ranks[1], "forward", 1)
        until(lambda: (hear(heard), heard.step)[1] == 1)

    def test_patience_is_learned_from_steps_once_all_have_taken_some(
        self, ranks: list[Worker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pulse, "LEAST_TIMEOUT_SECONDS", 0.1)
        heard = Pulse(ranks)
        most = 100.0
        ray.get(ranks[0].actor.train.remote(8))
        ray.get(ranks[1].actor.train.remote(2))
        hear(heard)
        assert heard.timeout(most) == most - REPORT_SECONDS, "one of them took too few"
        ray.get(ranks[1].actor.train.remote(8))
        hear(heard)
        learned = heard.timeout(most)
        assert 10 * STEP_SECONDS <= learned < most - REPORT_SECONDS
        assert heard.timeout(learned / 2) < learned / 2, "the time-out bounds it from above"
        monkeypatch.setattr(pulse, "LEAST_TIMEOUT_SECONDS", 50.0)
        assert heard.timeout(most) == 50.0, "steps of milliseconds are no measure"

    def test_while_one_does_what_may_take_long_all_have_the_whole_time(
        self, ranks: list[Worker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pulse, "LEAST_TIMEOUT_SECONDS", 0.1)
        heard = Pulse(ranks)
        ray.get([worker.actor.train.remote(8) for worker in ranks])
        hear(heard)
        learned = heard.timeout(100.0)
        assert learned < 100.0 - REPORT_SECONDS
        for phase in ("reading data", "saving", "validating"):
            tell(ranks[1], phase, 8)
            hear(heard)
            assert heard.timeout(100.0) == 100.0 - REPORT_SECONDS, phase
            tell(ranks[1], "forward", 8)
            hear(heard)
            assert heard.timeout(100.0) < 50.0, phase


class TestNodeWatch:
    def test_an_agent_that_ends_is_replaced_and_the_node_is_used_again_once_it_answers(
        self, cluster: AgentsKept, node: Node
    ) -> None:
        watch = NodeWatch(cluster)
        watch.watch([node])
        assert watch.silent(wait_seconds=DEADLINE_SECONDS) == set()
        assert not watch.is_gone(node.address)
        ray.kill(cluster.agents[0])
        until(lambda: (watch.silent(), len(cluster.agents))[1] == 2)
        assert watch.silent() == set(), "an agent is not the node"
        assert watch.unusable() == {node.id}, "but nothing starts there until another answers"
        until(lambda: watch.unusable() == set())
        ray.kill(cluster.agents[1])
        until(lambda: (watch.silent(), len(cluster.agents))[1] == 3)
        until(lambda: watch.unusable() == set())

    def test_a_stopped_agent_makes_its_node_doubtful_at_a_loss_and_silent_in_time(
        self, cluster: AgentsKept, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pulse, "NODE_SILENCE_SECONDS", 6.0)
        watch = NodeWatch(cluster)
        watch.watch([node])
        assert watch.silent(wait_seconds=DEADLINE_SECONDS) == set()
        pid = ray.get(cluster.agents[0].__ray_call__.remote(lambda _: os.getpid()))
        watch.silent(wait_seconds=1.0)
        os.kill(pid, signal.SIGSTOP)
        try:
            watch.silent(wait_seconds=0.2)  # the answer to what was asked before
            assert watch.is_gone(node.address), "a rank died there, and nobody answers"
            assert watch.unusable() == {node.id}
            assert watch.silent() == set(), "it may answer yet"
            until(lambda: watch.silent() == {node.id})
            assert watch.silent_seconds(node.id) > 6.0
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: watch.unusable() == set())
        assert watch.silent_seconds(node.id) < 6.0
        assert not watch.is_gone(node.address)

    def test_a_first_agent_may_take_its_time(
        self, cluster: AgentsKept, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pulse, "NODE_ANSWER_SECONDS", 0.0)
        watch = NodeWatch(cluster)
        watch.watch([node])
        assert not watch.is_gone(node.address)
        assert watch.unusable() == set()

    def test_a_node_without_two_agents_is_gone_and_its_successor_inherits_nothing(
        self, cluster: AgentsKept, node: Node
    ) -> None:
        watch = NodeWatch(cluster)
        watch.watch([Node(id=NOBODY[:-1] + "e", address=node.address, room=2)])
        until(lambda: watch.silent() == {NOBODY[:-1] + "e"})
        assert len(cluster.agents) == 2, "no agent is started for ever"
        assert watch.is_gone(node.address)
        watch.watch([node])
        assert watch.silent(wait_seconds=DEADLINE_SECONDS) == set()
        assert not watch.is_gone(node.address)
        assert watch.unusable() == set()

    def test_stacks_come_from_the_ranks_nodes(self, cluster: AgentsKept, node: Node) -> None:
        watch = NodeWatch(cluster)
        watch.watch([node])
        watch.silent(wait_seconds=DEADLINE_SECONDS)
        here = Worker(rank=3, actor=None, node=node, pid=os.getpid(), place=None)
        elsewhere = Node(id="elsewhere", address="192.0.2.1", room=1)
        unknown = Worker(rank=4, actor=None, node=elsewhere, pid=1, place=None)
        stacks = watch.stacks([here, unknown])
        assert stacks.keys() == {3}
        assert "test_stacks_come_from_the_ranks_nodes" in stacks[3]
