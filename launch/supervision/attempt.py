"""One attempt, from the ranks' start to its end: an outcome, a failure, or a move.

Owns watching. Leaves starting, ending and restarting to `supervisor.py`.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.failure import Failure
from launch.on_ray.answers import answer, answered
from launch.on_ray.cluster import Worker
from launch.supervision.cause import Ended, LogTails, cause_of, is_explained
from launch.supervision.hang import culprits
from launch.supervision.pulse import UNRESPONSIVE, NodeWatch, Pulse
from moetrain.kinds import FailureKind
from moetrain.observe import ProgressDisplay
from moetrain.train.control import Outcome

POLL_SECONDS = 0.5
CAUSE_SECONDS = 3.0  # for the rank behind a lost connection to fail itself
IDLE_SECONDS = 2.0  # for ranks that lost a peer to return, to be reused
CLUSTER_LOOK_SECONDS = 2.0
ANSWER_SECONDS = 2.0  # for ranks to tell their stacks
GROW_AFTER_LOOKS = 3  # for which a larger layout must have had room


@dataclass(frozen=True, kw_only=True)
class Moved:
    """An attempt that checkpointed and ended, to continue elsewhere or in another layout."""

    reason: str
    step: int
    forced: bool
    """Whether the move is a preemption; otherwise more nodes came."""
    ends: bool
    """Whether the command's own node will be preempted: nothing can continue from here."""


class Attempt:
    """The running ranks of one attempt."""

    def __init__(
        self,
        running: dict[Any, Worker],
        *,
        nodes: NodeWatch,
        own_node: str,
        display: ProgressDisplay,
        log_dir: Path,
        logs: LogTails,
        hang_timeout_seconds: float,
        stop_requested: Callable[[], bool],
        leaving: Callable[[], dict[str, str]],
        may_grow: Callable[[], bool],
    ) -> None:
        """`running` are the ranks' pending results, `logs` what they write. `leaving` returns the
        ids of nodes that will be preempted, and why; `may_grow` returns whether a larger layout has
        room."""
        self._pending = dict(running)
        self._pulse = Pulse(list(running.values()))
        self._nodes = nodes
        self._own_node = own_node
        self._display = display
        self._log_dir = log_dir
        self._logs = logs
        self._hang_timeout = hang_timeout_seconds
        self._stop_requested = stop_requested
        self._leaving = leaving
        self._may_grow = may_grow
        self._stopping = False
        self._moving = False
        self._move: str | None = None
        """The reason for the newest move; the ranks may still be ending when the reason is gone."""
        self._forced = self._ends = False
        self._looks = 0
        self._look_at = time.monotonic() + CLUSTER_LOOK_SECONDS
        self.idle: list[Worker] = []
        """Processes whose rank returned because it lost a peer: they may be reused."""

    def watch(self) -> Outcome | Failure | Moved:
        """Waits for the attempt's end and returns its result."""
        outcomes: list[tuple[int, Outcome]] = []
        while self._pending:
            for reference in answered(list(self._pending), timeout=POLL_SECONDS):
                worker = self._pending.pop(reference)
                result = answer(reference)
                if isinstance(result, Failure):
                    return self._cause(worker, result)
                outcomes.append((worker.rank, result))
            self._pass_on_requests()
            self._pulse.take(self._show)
            if failure := self._lost_node() or self._hang():
                return failure
        self._pulse.take(self._show, wait_seconds=POLL_SECONDS)
        outcome = min(outcomes, key=lambda pair: pair[0])[1]
        if outcome.finished or self._move is None or self._stop_requested():
            return outcome
        return Moved(reason=self._move, step=outcome.step, forced=self._forced, ends=self._ends)

    def _pass_on_requests(self) -> None:
        """Tells the ranks to stop or to move, if there is a reason."""
        if self._stop_requested() and not self._stopping:
            self._stopping = True
            self._display.say("stopping: checkpointing after this step")
            self._call_ranks(lambda actor: actor.stop.remote())
        if self._stopping or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + CLUSTER_LOOK_SECONDS
        if not self._forced:
            self._leave()
        if not self._forced:
            self._grow()

    def _leave(self) -> None:
        """Makes all ranks checkpoint and end if a node of the run will be preempted."""
        leaving = self._leaving()
        taken = {
            f"{w.node.address} ({leaving[w.node.id]})"
            for w in self._pending.values()
            if w.node.id in leaving
        }
        self._ends = self._own_node in leaving
        if self._ends:
            taken.add(f"of this command ({leaving[self._own_node]})")
        if taken:
            self._forced = self._moving = True
            self._move = f"node {', '.join(sorted(taken))} will be preempted"
            self._display.say(f"{self._move}: checkpointing after this step")
            self._call_ranks(lambda actor: actor.stop.remote())

    def _grow(self) -> None:
        """Makes all ranks end at their next checkpoint if there is room for a larger layout."""
        self._looks = self._looks + 1 if self._may_grow() else 0
        if self._looks >= GROW_AFTER_LOOKS and not self._moving:
            self._moving = True
            self._move = "there is room for a larger layout again"
            self._display.say(f"{self._move}: moving at the next checkpoint")
            self._call_ranks(lambda actor: actor.move.remote(True))
        elif not self._looks and self._moving:
            self._moving = False
            self._display.say("the room for a larger layout is gone: staying")
            self._call_ranks(lambda actor: actor.move.remote(False))

    def _call_ranks(self, tell: Callable[[Any], object]) -> None:
        for worker in self._pending.values():
            tell(worker.actor)

    def _cause(self, worker: Worker, first: Failure) -> Failure:
        """Returns the cause of the first failure seen, which may be only a symptom.

        Waits a moment for the other ranks, until all have ended: one may know the cause, and those
        that return are `idle`.
        """
        found = [(worker, self._ended(worker, first))]
        began = time.monotonic()
        while self._pending:
            known = is_explained(one for _, one in found)
            if time.monotonic() > began + (IDLE_SECONDS if known else CAUSE_SECONDS):
                break
            for reference in answered(list(self._pending), timeout=0.1):
                other, result = self._pending.pop(reference), answer(reference)
                if isinstance(result, Failure):
                    found.append((other, self._ended(other, result)))
        self.idle = [other for other, one in found if one.failure.kind == FailureKind.peer]
        return replace(cause_of([one for _, one in found]), step=self._pulse.step)

    def _ended(self, worker: Worker, failure: Failure) -> Ended:
        return Ended(
            rank=worker.rank,
            address=worker.node.address,
            name=_named(worker),
            failure=failure,
            log=self._logs.of(worker.rank),
        )

    def _lost_node(self) -> Failure | None:
        silent = self._nodes.silent()
        lost = [w for w in self._pending.values() if w.node.id in silent]
        if not lost:
            return None
        node = lost[0].node
        ranks = ", ".join(str(w.rank) for w in lost if w.node.id == node.id)
        return Failure(
            kind=FailureKind.lost,
            reason=f"node {node.address} does not answer (ranks {ranks})",
            step=self._pulse.step,
            node=node.address,
            silent_seconds=self._nodes.silent_seconds(node.id),
        )

    def _hang(self) -> Failure | None:
        """Returns the current hang, after writing a report of every rank to the run's logs.

        Ranks that are done wait for nobody; the first may still be uploading.
        """
        working = {w.rank: w for w in self._pending.values()}
        silent = {r: s for r, s in self._pulse.silent(self._hang_timeout).items() if r in working}
        if not silent:
            return None
        stacks = self._stacks(working.values())
        in_flight = _texts({w.actor.collectives.remote(): w.rank for w in working.values()})
        doing = {rank: self._pulse.doing(rank) for rank in silent}
        unresponsive = {rank for rank, said in silent.items() if said.startswith(UNRESPONSIVE)}
        found_culprits = culprits(doing, stacks, unresponsive=unresponsive)
        path = self._log_dir / f"hang_{time.strftime('%Y%m%d-%H%M%S')}.txt"
        what = "; ".join(f"{_named(working[rank])} {silent[rank]}" for rank in found_culprits)
        others = len(working) - len(found_culprits)
        waiting = f"; {others} other {'rank waits' if others == 1 else 'ranks wait'}"
        waiting = waiting if others else ""
        lines = [f"no progress for {self._pulse.timeout(self._hang_timeout):.0f} s: {what}\n"]
        for rank, worker in sorted(working.items()):
            said = silent.get(rank) or f"in {self._pulse.doing(rank)}"
            lines.append(f"===== {_named(worker)} {said}\n{in_flight.get(rank, '')}")
            lines.append(f"{stacks.get(rank, 'no stacks')}\n")
        path.write_text("\n".join(lines))
        nodes = {working[rank].node.address for rank in found_culprits}
        return Failure(
            kind=FailureKind.hung,
            reason=f"hang: {what}{waiting}; stacks are in {path}",
            step=self._pulse.step,
            node=nodes.pop() if len(nodes) == 1 else None,
            silent_seconds=self._pulse.timeout(self._hang_timeout),
        )

    def _stacks(self, workers: Iterable[Worker]) -> dict[int, str]:
        """Returns the ranks' stacks: as they report them, else read from outside."""
        workers = list(workers)
        stacks = _texts({w.actor.stacks.remote(): w.rank for w in workers})
        unresponsive = [w for w in workers if w.rank not in stacks]
        return stacks | self._nodes.stacks(unresponsive)

    def _show(self, kind: str, content: Any) -> None:
        if kind == "record":
            self._display.update(content)
        else:
            self._display.say(content)


def _texts(asked: dict[Any, int]) -> dict[int, str]:
    """Returns by rank what ranks answer in time."""
    found = answered(list(asked), timeout=ANSWER_SECONDS, wait_for_all=True)
    answers = {asked[reference]: answer(reference) for reference in found}
    return {rank: text for rank, text in answers.items() if isinstance(text, str)}


def _named(worker: Worker) -> str:
    return f"rank {worker.rank} on {worker.node.address} (pid {worker.pid})"
