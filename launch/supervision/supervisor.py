"""Keeps a run going on Ray: placement, attempts, hangs, nodes that leave and join, requests to
stop.

Owns the decision when, where and in which layout to restart. Leaves Ray itself to
`on_ray/cluster.py`, counting to `budget.py`, and everything that a rank does to `moetrain.train`.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from launch.failure import ClusterError, Failure, RunFailed
from launch.on_ray.answers import WorkersLost
from launch.on_ray.cluster import RayCluster, Worker, rank_log
from launch.placement import Node, Share, choose_nodes
from launch.supervision.attempt import Attempt, Moved
from launch.supervision.budget import NODES_OWN, Budget
from launch.supervision.cause import LogTails
from launch.supervision.pulse import NodeWatch
from moetrain.checkpoint.manifest import is_passing
from moetrain.checkpoint.remote.of_run import take_over
from moetrain.checkpoint.trained import newest_manifest
from moetrain.kinds import EventKind, FailureKind
from moetrain.observe import EventLog, ProgressDisplay
from moetrain.settings import Resolved
from moetrain.train.control import Outcome, RankPlace

POLL_SECONDS = 0.5
FEW_NODES = 4  # most nodes named in a line
SETTLE_SECONDS = 30.0  # for Ray to update its free resources after a loss


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _listed(shares: list[Share]) -> str:
    few = len(shares) <= FEW_NODES
    return ", ".join(s.node.address for s in shares) if few else f"{len(shares)} nodes"


class Supervisor:
    """One run on a Ray cluster, over as many attempts as it takes.

    `refit` returns the configuration for another number of ranks, None if no valid layout has so
    many.
    """

    def __init__(
        self,
        config: Resolved,
        cluster: RayCluster,
        *,
        refit: Callable[[int], Resolved | None],
        display: ProgressDisplay,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._on_gpu = config.run.device == "cuda"
        self._refit = cache(refit)
        self._display = display
        self._stop_requested = stop_requested
        self._run_dir = config.run_dir
        self._event = EventLog(self._run_dir / "events.jsonl").write
        self._nodes = NodeWatch(cluster, warnings=config.cluster.spot_warnings)
        self._budget = Budget(config.launch, saved_step=self._saved_step())
        self._survivors: list[Worker] = []
        self._survivors_layout: Resolved | None = None
        self._told_left_out: set[str] = set()

    def run(self) -> Outcome:
        """Returns how the run ended; raises RunFailed or ClusterError if it can't continue."""
        again = False
        moved: str | None = None
        while True:
            try:
                found = self._find_place(resuming=again)
            except ClusterError:
                if moved is None:
                    raise
                return self._stopped(f"{moved}, and no other node has room")
            if found is None:
                return self._stopped("stopped while waiting for nodes")
            ended = self._attempt(*found, again=again)
            again = True
            if isinstance(ended, Outcome):
                return ended
            if isinstance(ended, Moved):
                moved = ended.reason
                self._event(EventKind.move, step=ended.step, reason=ended.reason)
                if ended.ends:
                    return self._stopped(f"{ended.reason}; saved at step {ended.step}")
                if ended.forced and (reason := self._budget.count_preemption()):
                    raise RunFailed(f"{reason}: {ended.reason}")
                self._display.say(f"{ended.reason}; saved at step {ended.step}, moving on")
                continue
            failure = self._recover(ended)
            if self._stop_requested():
                return self._stopped(f"stopped; {failure.reason}")
            moved = failure.reason if failure.kind == FailureKind.preempted else None

    def _recover(self, failure: Failure) -> Failure:
        """Reports a failure and returns its cause.

        Raises RunFailed if the run must not be restarted.
        """
        announced = self._nodes.is_among(self._leaving(), failure.node)
        if failure.kind in NODES_OWN and announced:
            failure = replace(failure, kind=FailureKind.preempted)
        if failure.kind == FailureKind.died and self._nodes.is_gone(failure.node):
            lost = f"node {failure.node} is lost; {failure.reason}"
            failure = replace(failure, kind=FailureKind.lost, reason=lost)
        saved = self._saved_step()
        self._event(
            EventKind.failure,
            reason=failure.reason,
            failure=failure.kind,
            step=failure.step,
            node=failure.node,
            silent_seconds=failure.silent_seconds,
            last_saved_step=saved,
        )
        reason = self._budget.count(failure, saved_step=saved)
        if reason:
            raise RunFailed(reason)
        if not self._stop_requested():
            self._event(EventKind.restart, step=saved)
            self._display.say(f"{failure.reason}; restarting from step {saved}")
        return failure

    def _stopped(self, reason: str) -> Outcome:
        self._display.say(reason)
        return Outcome(finished=False, step=self._saved_step(), last={})

    def _find_place(self, *, resuming: bool) -> "tuple[Resolved, list[Share]] | None":
        """Returns the layout and its nodes; None if a stop was requested meanwhile.

        Waits for the full layout as long as allowed. After that, and at once when it resumes, an
        elastic run uses the largest smaller layout, and grows again later. Raises ClusterError that
        names what is missing.
        """
        settings = self._config.launch
        wait = max(settings.wait_for_nodes_seconds, SETTLE_SECONDS if resuming else 0.0)
        deadline = time.monotonic() + wait
        said = False
        while not self._stop_requested():
            waits = time.monotonic() < deadline
            self._cluster.look()
            # a run stays on the device it started on
            if self._config.run.device == "auto" and not resuming:
                self._on_gpu = self._cluster.has_gpus()
            place = self._place(may_shrink=settings.elastic and (resuming or not waits))
            if place is not None and self._cluster.reserve(place[1], on_gpu=self._on_gpu):
                self._cluster.request(0, on_gpu=self._on_gpu)
                self._nodes.watch(share.node for share in place[1])
                return place
            if not waits:
                raise ClusterError(self._what_is_missing())
            self._cluster.request(settings.num_workers, on_gpu=self._on_gpu)
            if not said:
                said = True
                ranks = _counted(settings.num_workers, "rank")
                self._display.phase(f"waiting for nodes for {ranks}")
            time.sleep(POLL_SECONDS)
        return None

    def _place(self, *, may_shrink: bool) -> "tuple[Resolved, list[Share]] | None":
        """Returns the full layout with its nodes, or if allowed the largest smaller one that has
        room; nodes that failed too often are used only if there are no others."""
        nodes = self._usable_nodes()
        left_out = self._budget.left_out
        for usable in ([n for n in nodes if n.address not in left_out], nodes):
            room, full = sum(n.room for n in usable), self._config.launch.num_workers
            sizes = range(min(room, full), 0, -1) if may_shrink else [full]
            for num_ranks in sizes:
                config = self._config if num_ranks == full else self._refit(num_ranks)
                shares = config and choose_nodes(
                    usable,
                    num_ranks=num_ranks,
                    group_size=config.parallel.expert_degree,
                    failures=self._budget.node_failures,
                )
                if config and shares:
                    return config, shares
        return None

    def _usable_nodes(self) -> list[Node]:
        unusable = self._nodes.unusable()
        return [n for n in self._cluster.nodes(on_gpu=self._on_gpu) if n.id not in unusable]

    def _what_is_missing(self) -> str:
        wanted = self._config.launch.num_workers
        kind = "GPU" if self._on_gpu else "CPU"
        nodes = self._usable_nodes()
        room = sum(node.room for node in nodes)
        places = ", ".join(f"{n.address}: {n.room}" for n in sorted(nodes, key=lambda n: n.address))
        return (
            f"launch.num_workers={wanted}: each rank needs a free {kind}, and the cluster has "
            f"{room} of them ({places or 'no node'}). Ask for fewer ranks, wait for more nodes "
            "(launch.wait_for_nodes_seconds), or let the run shrink (launch.elastic=true)"
        )

    def _attempt(
        self, config: Resolved, shares: list[Share], *, again: bool
    ) -> "Outcome | Failure | Moved":
        """Runs all ranks once; returns the outcome, or what ended it."""
        attempt = self._take_over(may_be_alone=again)
        # Decided here: a rank without a GPU of its own may still see another's.
        device = "cuda" if self._on_gpu else "cpu"
        config = replace(config, run=replace(config.run, device=device))
        world_size = config.launch.num_workers
        self._display.phase(f"starting {_counted(world_size, 'rank')} on {_listed(shares)}")
        self._report_left_out(shares)
        workers: list[Worker] = []
        idle: list[Worker] = []
        log_dir = self._run_dir / "logs"
        logs = LogTails({rank: rank_log(log_dir, rank) for rank in range(world_size)})
        try:
            workers = self._cluster.start_workers(
                shares,
                survivors=self._usable_survivors(config),
                on_gpu=self._on_gpu,
                log_dir=log_dir,
                interrupted=lambda: self._interruption(shares),
            )
            rendezvous = self._cluster.rendezvous(workers, lambda: self._interruption(shares))
            self._event(
                EventKind.attempt,
                attempt=attempt,
                world_size=world_size,
                ranks=[{"rank": w.rank, "node": w.node.address, "pid": w.pid} for w in workers],
            )
            local = {share.node.id: share.num_ranks for share in shares}
            running = {
                w.actor.run.remote(
                    config,
                    RankPlace(
                        rank=w.rank,
                        world_size=world_size,
                        local_world_size=local[w.node.id],
                        rendezvous=rendezvous,
                        attempt=attempt,
                    ),
                ): w
                for w in workers
            }
            at_work = Attempt(
                running,
                nodes=self._nodes,
                own_node=self._cluster.own_node,
                display=self._display,
                log_dir=log_dir,
                logs=logs,
                hang_timeout_seconds=config.launch.hang_timeout_seconds,
                stop_requested=self._stop_requested,
                leaving=self._leaving,
                may_grow=lambda: self._may_grow(world_size),
            )
            ended = at_work.watch()
            idle = at_work.idle
            return ended
        except WorkersLost as error:
            if self._stop_requested():
                return self._stopped("stopped while the ranks started")
            return error.failure
        finally:
            # With CUDA no process is reused: its context may be broken.
            self._survivors = [] if self._on_gpu else self._cluster.cleared(idle)
            self._survivors_layout = config
            kept = {w.rank for w in self._survivors}
            self._cluster.end_workers([w for w in workers if w.rank not in kept])

    def _take_over(self, *, may_be_alone: bool) -> int:
        """Returns the new attempt's number; retries while the file system fails temporarily."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                return take_over(
                    self._config.checkpoint,
                    run=self._config.run.name,
                    directory=self._run_dir / "checkpoints",
                    may_be_alone=may_be_alone,
                )
            except OSError as error:
                over = self._stop_requested() or time.monotonic() > deadline
                if over or not is_passing(error):
                    raise
                self._display.phase(f"waiting for {self._run_dir} ({error})")
                time.sleep(POLL_SECONDS)

    def _usable_survivors(self, config: Resolved) -> list[Worker]:
        """Returns the processes that may be reused: of the same layout, on nodes still reserved.

        Ends the others. Torch caches results for distributed tensors of a layout and a rank as long
        as the process lives; as another rank, or in another layout, they would be wrong.
        """
        same = config == self._survivors_layout
        usable = [w for w in self._survivors if same and self._cluster.holds(w)]
        self._cluster.end_workers([w for w in self._survivors if w not in usable])
        return usable

    def _interruption(self, shares: list[Share]) -> Failure | None:
        """Returns why waiting for starting ranks is pointless."""
        if self._stop_requested():
            return Failure(kind=FailureKind.died, reason="a stop was asked for")
        silent = self._nodes.silent()
        lost = sorted({s.node.address for s in shares if s.node.id in silent})
        if not lost:
            return None
        return Failure(
            kind=FailureKind.lost, reason=f"node {lost[0]} does not answer", node=lost[0]
        )

    def _leaving(self) -> dict[str, str]:
        """Returns the ids of nodes that will be preempted, and why."""
        return self._cluster.draining() | self._nodes.warned()

    def _may_grow(self, num_ranks: int) -> bool:
        """Returns whether a larger layout than the present one has room."""
        full = self._config.launch.num_workers
        if num_ranks >= full:
            return False
        self._cluster.request(full, on_gpu=self._on_gpu)
        place = self._place(may_shrink=True)
        return place is not None and (place[0].launch.num_workers) > num_ranks

    def _report_left_out(self, shares: list[Share]) -> None:
        self._told_left_out &= self._budget.left_out
        used = {share.node.address for share in shares}
        for node in sorted(self._budget.left_out - used - self._told_left_out):
            self._told_left_out.add(node)
            reason = f"node {node} failed {self._budget.node_failures[node]} times and is left out"
            self._event(EventKind.node_left_out, node=node, reason=reason)
            self._display.say(reason)

    def _saved_step(self) -> int:
        newest = newest_manifest(self._run_dir)
        return newest.step if newest else 0
