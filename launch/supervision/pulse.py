"""Heartbeats of ranks and nodes: who is alive, who makes progress, and who hangs.

Never waits for one that doesn't answer. Leaves reactions to the supervisor.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from launch.failure import Failure
from launch.on_ray.answers import answer, answered
from launch.on_ray.cluster import RayCluster, Worker
from launch.on_ray.node_agent import STACK_SECONDS, NodeAgent
from launch.placement import Node
from moetrain.parallel import COMPUTING_PHASES, STEP_PHASES, Doing

UNRESPONSIVE = "does not answer"
LEAST_TIMEOUT_SECONDS = 30.0
PATIENCE_IN_STEPS = 10.0
REPORT_SECONDS = 3.0  # that stacks usually take, so that a hang is reported within its timeout
NODE_SILENCE_SECONDS = 10.0
NODE_ANSWER_SECONDS = 2.0
NODE_RETURN_SECONDS = 30.0  # timeout for another agent on a node
NODE_START_SECONDS = 120.0  # ... the first one


@dataclass
class LastStatus:
    """A rank's newest heartbeat."""

    at: float
    doing: Doing
    silent: float = 0.0
    slowest_step: float | None = None


class Pulse:
    """The ranks of one attempt."""

    def __init__(self, workers: list[Worker]) -> None:
        now = time.monotonic()
        self._workers = {w.rank: w for w in workers}
        self._asked = {rank: w.actor.collect.remote() for rank, w in self._workers.items()}
        self._heard = {rank: LastStatus(at=now, doing=Doing()) for rank in self._workers}

    def take(self, show: Callable[[str, Any], None], *, wait_seconds: float = 0.0) -> None:
        """Takes the answers that have arrived, shows what they publish, and polls again."""
        ranks = {reference: rank for rank, reference in self._asked.items()}
        for reference in answered(list(ranks), timeout=wait_seconds, wait_for_all=True):
            rank, status = ranks[reference], answer(reference)
            if isinstance(status, Failure):
                continue  # the rank's own result says more
            self._heard[rank] = LastStatus(
                at=time.monotonic(),
                doing=status["doing"],
                silent=status["silent_seconds"],
                slowest_step=status["slowest_step"],
            )
            for kind, content in status["published"]:
                show(kind, content)
            self._asked[rank] = self._workers[rank].actor.collect.remote()

    @property
    def step(self) -> int | None:
        """The ranks' step, as far as they reported it; None before the first."""
        steps = [h.doing.step for h in self._heard.values() if h.doing.phase in STEP_PHASES]
        return max(steps, default=None)

    def doing(self, rank: int) -> Doing:
        """Returns what a rank did at its last heartbeat."""
        return self._heard[rank].doing

    def timeout(self, most: float) -> float:
        """Returns for how many seconds ranks may make no progress now.

        While all compute, that follows from the slowest of their recent steps. While one reads
        data, saves or validates, it is `most`, because the others may wait for it. The time that a
        report takes is subtracted.
        """
        most = max(most - REPORT_SECONDS, most / 2)
        if any(h.doing.phase not in COMPUTING_PHASES for h in self._heard.values()):
            return most
        slowest = [h.slowest_step for h in self._heard.values()]
        known = [seconds for seconds in slowest if seconds is not None]
        if len(known) < len(slowest):
            return most
        return min(most, max(LEAST_TIMEOUT_SECONDS, PATIENCE_IN_STEPS * max(known)))

    def silent(self, most: float) -> dict[int, str]:
        """Returns the ranks that made no progress for too long, with what they were doing."""
        now, limit = time.monotonic(), self.timeout(most)
        found = {}
        for rank, heard in self._heard.items():
            unheard = now - heard.at
            if heard.silent + unheard > limit:
                state = UNRESPONSIVE if unheard > limit / 2 else "makes no progress"
                found[rank] = f"{state} in {heard.doing}"
        return found


class NodeWatch:
    """The nodes that a run uses, as long as it runs."""

    def __init__(self, cluster: RayCluster, *, warnings: str = "none") -> None:
        """`warnings` names the cloud whose metadata service warns of preemptions."""
        self._cluster = cluster
        self._warnings = warnings
        self._own = NodeAgent(warnings)
        self._asked: dict[str, _Asked] = {}
        self._nodes: dict[str, Node] = {}
        self._heard: dict[str, float] = {}
        self._doubtful: set[str] = set()
        self._gone: set[str] = set()
        self._warned: dict[str, str] = {}

    def watch(self, nodes: Iterable[Node]) -> None:
        """Begins to poll new nodes, except this one, which lives as we do."""
        for node in nodes:
            if node.id not in self._nodes:
                self._forget(node.address)
            self._nodes[node.id] = node
            self._heard.setdefault(node.id, time.monotonic())
            if node.id not in self._asked and node.id != self._cluster.own_node:
                agent = self._cluster.start_agent(node, warnings=self._warnings)
                self._asked[node.id] = _Asked(agent, timeout=NODE_START_SECONDS, new_agent=1)

    def _forget(self, address: str) -> None:
        """Forgets earlier nodes of an address: their state says nothing about the new one."""
        for node in [n for n, known in self._nodes.items() if known.address == address]:
            del self._nodes[node]
            self._asked.pop(node, None)
            self._warned.pop(node, None)
            self._doubtful.discard(node)
            self._gone.discard(node)

    def silent(self, *, wait_seconds: float = 0.0) -> set[str]:
        """Returns the ids of nodes whose heartbeat timed out; polls the others again.

        If an agent ended, or can't be reached any more, another one is started and polled. If that
        fails too, the node is lost; should it return, it has another id.
        """
        by_answer = {asked.answer: node for node, asked in self._asked.items()}
        for reference in answered(list(by_answer), timeout=wait_seconds, wait_for_all=True):
            node, said = by_answer[reference], answer(reference)
            asked = self._asked.pop(node)
            if isinstance(said, Failure) and asked.new_agent == 2:
                self._gone.add(node)
                continue
            if isinstance(said, Failure):
                self._doubtful.add(node)
                agent = self._cluster.start_agent(self._nodes[node], warnings=self._warnings)
                self._asked[node] = _Asked(agent, timeout=NODE_RETURN_SECONDS, new_agent=2)
                continue
            self._doubtful.discard(node)
            self._heard[node] = time.monotonic()
            if said:
                self._warned[node] = said
            self._asked[node] = _Asked(asked.agent, timeout=NODE_SILENCE_SECONDS)
        return self._gone | {node for node, asked in self._asked.items() if asked.is_overdue()}

    def silent_seconds(self, node: str) -> float:
        """Returns the age of a node's newest heartbeat."""
        return time.monotonic() - self._heard[node]

    def unusable(self) -> set[str]:
        """Returns the ids of nodes on which nothing should be started now."""
        return self.silent() | self._doubtful | self.warned().keys()

    def is_gone(self, address: str | None) -> bool:
        """Returns whether a node seems lost, once all had a moment to answer.

        Nothing is started on a node that didn't answer, until it does. A first agent may still be
        starting.
        """
        before = {n: asked.answer for n, asked in self._asked.items() if asked.new_agent != 1}
        silent = self.silent(wait_seconds=NODE_ANSWER_SECONDS)
        self._doubtful |= {n for n, asked in self._asked.items() if before.get(n) is asked.answer}
        return self.is_among(silent | self._doubtful, address)

    def is_among(self, nodes: Iterable[str], address: str | None) -> bool:
        """Returns whether an address belongs to one of some nodes, by their ids."""
        return any(n in self._nodes and self._nodes[n].address == address for n in nodes)

    def warned(self) -> dict[str, str]:
        """Returns the ids of nodes that will be preempted, with the warnings."""
        if own := self._own.ping():
            self._warned[self._cluster.own_node] = own
        return self._warned

    def stacks(self, workers: Iterable[Worker]) -> dict[int, str]:
        """Returns the processes' states and stacks by rank, for nodes that answer in time."""
        by_node: dict[str, list[Worker]] = {}
        for worker in workers:
            by_node.setdefault(worker.node.id, []).append(worker)
        found: dict[str, Any] = {}
        asked = {}
        for node, there in by_node.items():
            pids = [w.pid for w in there]
            if node in self._asked:
                asked[self._asked[node].agent.stacks.remote(pids)] = node
            elif node == self._cluster.own_node:
                found[node] = self._own.stacks(pids)
        for reference in answered(list(asked), timeout=2 * STACK_SECONDS, wait_for_all=True):
            found[asked[reference]] = answer(reference)
        texts = {}
        for node, there in by_node.items():
            stacks = found.get(node)
            for worker in there:
                if isinstance(stacks, dict):
                    texts[worker.rank] = stacks[worker.pid]
        return texts


class _Asked:
    """A node's agent with a pending heartbeat."""

    def __init__(self, agent: Any, *, timeout: float, new_agent: int = 0) -> None:
        """`new_agent` is 1 for a node's first, 2 for a replacement; 0 once it answered."""
        self.agent, self.new_agent = agent, new_agent
        self.answer = agent.ping.remote()
        self._until = time.monotonic() + timeout

    def is_overdue(self) -> bool:
        return time.monotonic() > self._until
