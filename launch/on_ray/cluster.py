"""The part of Ray that the supervisor needs: nodes, placement, ranks, their answers."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

import launch.on_ray.node_agent
from launch.environment import Environment, reduced
from launch.failure import ClusterError, Failure
from launch.on_ray.access import only_this_user, require_access
from launch.on_ray.answers import WorkersLost, answer, answered, ask
from launch.on_ray.node_agent import NodeAgent
from launch.on_ray.private import SETUP_HOOK, draining_nodes, free_resources, keep_signal_handlers
from launch.on_ray.rank_actor import RankActor
from launch.placement import Node, Share
from moetrain.checks import ConfigError, require_no_secrets
from moetrain.own_packages import are_shadowed
from moetrain.redaction import redacted_text

RESERVE_TIMEOUT_SECONDS = 10.0
UNREADY_SECONDS = 60.0
LOOK_SECONDS = 2.0
CLEAR_SECONDS = 5.0
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
LOCAL_OBJECT_STORE_BYTES = 128 * 2**20  # ranks exchange tensors themselves, not through Ray


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One placed rank's process."""

    rank: int
    actor: Any
    node: Node
    pid: int
    place: Any
    """The placement group of the process, which ends with it."""


@dataclass(frozen=True, kw_only=True)
class _View:
    """The cluster's state from Ray's head node. Nodes are identified by their ids."""

    nodes: list[dict[str, Any]]
    free: dict[str, dict[str, float]]
    held: dict[str, int]
    """The ranks that we had reserved, which aren't free."""
    draining: set[str]


class RayCluster:
    """A Ray cluster that this process is connected to."""

    def __init__(
        self, *, own_node: str, local: bool, environment: Environment, closing: ExitStack
    ) -> None:
        self._local = local
        self._environment = environment
        self._closing = closing
        self.own_node = own_node
        """The id of the node that this process runs on."""
        self._reserved: dict[str, tuple[PlacementGroup, Share]] = {}
        self._unready: dict[str, float] = {}
        self._view = _View(nodes=[], free={}, held={}, draining=set())
        self._over: threading.Event | None = None
        self._wanted: list[dict[str, float]] = []
        self._told_wanted: list[dict[str, float]] = []

    @classmethod
    def connect(
        cls,
        address: str | None,
        *,
        num_workers: int = 1,
        allow_unauthenticated: bool = False,
        environment: Environment | None = None,
    ) -> "RayCluster":
        """Connects to the cluster at an address, or without one starts Ray on this machine.

        Raises ConfigError for a cluster that other machines can reach and that requires no token,
        unless that is allowed. Ranks get the `environment`.
        """
        quiet: dict[str, Any] = {
            "logging_level": logging.ERROR,
            "log_to_driver": False,
            "ignore_reinit_error": True,
        }
        environment = environment or Environment(public={}, secret={})
        if are_shadowed():  # Ray's workers import from this folder first
            public = {SETUP_HOOK: "moetrain.own_packages.find_own_packages", **environment.public}
            environment = replace(environment, public=public)
        local = address in (None, "", "local")
        with ExitStack() as closing, keep_signal_handlers():
            try:
                if not local:
                    assert address is not None
                    require_no_secrets(
                        sys.argv[1:], where="Ray shows the command line of whoever uses a cluster"
                    )
                    found = require_access(address, allow_unauthenticated=allow_unauthenticated)
                    ray.init(address=found, **quiet)
                else:
                    closing.enter_context(only_this_user())
                    # The ranks' own connections stay on this machine, too. NCCL would leave the
                    # loopback out and guess among the others; = means exactly this interface.
                    loopback = {
                        "GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE,
                        "NCCL_SOCKET_IFNAME": f"={LOOPBACK_INTERFACE}",
                    }
                    public = loopback | dict(environment.public)
                    with reduced(replace(environment, public=public)):
                        ray.init(
                            address="local",
                            num_cpus=max(num_workers, os.cpu_count() or 1),
                            include_dashboard=False,
                            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                            **quiet,
                        )
            except ConfigError:
                raise
            except Exception as error:  # Ray raises anything, even plain Exception
                raise ClusterError(
                    f"launch.address={address or 'null'}: Ray can't be reached or started "
                    f"({redacted_text(str(error))})"
                ) from error
            return cls(
                own_node=ray.get_runtime_context().get_node_id(),
                local=local,
                environment=environment,
                closing=closing.pop_all(),
            )

    def fitting_workers(self) -> int:
        """Returns the number of ranks that the cluster has room for: its GPUs, else its CPUs."""
        resources = ray.cluster_resources()
        return int(resources.get("GPU") or resources.get("CPU", 1))

    def gpus_per_node(self) -> int | None:
        """Returns the GPUs of the cluster's largest node; None: there are none, or not yet."""
        nodes = (node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
        return int(max(nodes, default=0)) or None

    def has_gpus(self) -> bool:
        """Returns whether any node had a GPU at the last `look`; the driver's node may have
        none."""
        return any(n["Alive"] and n["Resources"].get("GPU") for n in self._view.nodes)

    def nodes(self, *, on_gpu: bool) -> list[Node]:
        """Returns the nodes that were alive and not draining at the last `look`, with the room that
        we may use."""
        view, found = self._view, []
        for entry in view.nodes:
            node = entry["NodeID"]
            if not entry["Alive"] or node in view.draining:
                continue
            if time.monotonic() < self._unready.get(node, 0.0):
                continue
            has = view.free.get(node, {})
            room = int(min(has.get(kind, 0) for kind in _rank_resources(on_gpu)))
            room += view.held.get(node, 0)
            found.append(Node(id=node, address=entry["NodeManagerAddress"], room=room))
        return found

    def draining(self) -> dict[str, str]:
        """Returns the ids of the nodes that have ever been drained in Ray."""
        return dict.fromkeys(self._view.draining, "Ray drains it")

    def look(self) -> None:
        """Refreshes the cluster's state, and requests resources from an autoscaler.

        After the first call a thread repeats it. A supervisor that waited for an unresponsive head
        node would let its ranks' leases expire.
        """
        draining = self._view.draining  # Ray forgets draining nodes once they are gone
        with suppress(Exception):  # not a public interface: no reason to fail a run
            draining = draining | draining_nodes()
        held = {node: share.num_ranks for node, (_, share) in list(self._reserved.items())}
        free = free_resources()
        self._view = _View(nodes=ray.nodes(), free=free, held=held, draining=draining)
        self._request_resources()
        if self._over is None:
            over = self._over = threading.Event()

            def keep_refreshing() -> None:
                while not over.wait(LOOK_SECONDS):
                    with suppress(Exception):  # the next look may succeed
                        self.look()

            threading.Thread(target=keep_refreshing, name="cluster", daemon=True).start()

    def request(self, num_ranks: int, *, on_gpu: bool) -> None:
        """Requests room for so many ranks from an autoscaler, if there is one; 0: no more.

        The request is sent with the next `look`.
        """
        self._wanted = [_rank_resources(on_gpu)] * num_ranks

    def _request_resources(self) -> None:
        if (wanted := self._wanted) != self._told_wanted:
            request_resources(bundles=wanted)
            self._told_wanted = wanted

    def reserve(self, shares: Sequence[Share], *, on_gpu: bool) -> bool:
        """Reserves the shares' nodes and releases all others; False if one isn't available.

        A node that didn't grant its reservation is left alone for a while: it may be lost without
        Ray knowing yet.
        """
        wanted = {share.node.id: share for share in shares}
        for node, (group, held) in list(self._reserved.items()):
            if node not in wanted or held.num_ranks != wanted[node].num_ranks:
                remove_placement_group(group)
                del self._reserved[node]
        for node in wanted.keys() - self._reserved.keys():
            share = wanted[node]
            bundle = {k: n * share.num_ranks for k, n in _rank_resources(on_gpu).items()}
            bundle[f"node:{share.node.address}"] = 0.001
            group = placement_group([bundle], strategy="STRICT_PACK")
            self._reserved[node] = group, share
        deadline = time.monotonic() + RESERVE_TIMEOUT_SECONDS
        ready = True
        for node in wanted:
            group, _ = self._reserved[node]
            if not group.wait(max(0.1, deadline - time.monotonic())):
                remove_placement_group(group)
                del self._reserved[node]
                self._unready[node] = time.monotonic() + UNREADY_SECONDS
                ready = False
        return ready

    def holds(self, worker: Worker) -> bool:
        """Returns whether a process's reservation is still held."""
        held = self._reserved.get(worker.node.id)
        return held is not None and held[0] is worker.place

    def give_back(self) -> None:
        """Releases all reservations, and ends what runs there."""
        for group, _ in self._reserved.values():
            remove_placement_group(group)
        self._reserved = {}

    def start_workers(
        self,
        shares: Sequence[Share],
        *,
        survivors: Sequence[Worker],
        on_gpu: bool,
        log_dir: Path,
        interrupted: Callable[[], Failure | None],
    ) -> list[Worker]:
        """Starts a process for each rank, or reuses the survivor that had the rank on the same
        node.

        Raises WorkersLost if one of them dies, isn't ready in time, or it is `interrupted`.
        """
        idle = {(w.node.id, w.rank): w for w in survivors}
        # Processes of a Ray started here have them already, and start faster without.
        env = {} if self._local else dict(self._environment.public)
        started: list[tuple[Any, Node]] = []
        for share in shares:
            group, _ = self._reserved[share.node.id]
            for _ in range(share.num_ranks):
                known = idle.pop((share.node.id, len(started)), None)
                if known is not None:
                    started.append((known.actor, share.node))
                    continue
                actor = RankActor.options(  # type: ignore[attr-defined]
                    num_cpus=1,
                    num_gpus=1 if on_gpu else 0,
                    max_concurrency=5,  # training, and polls at the same time
                    runtime_env={"env_vars": env} if env else None,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group),
                ).remote()
                started.append((actor, share.node))
        self.end_workers(list(idle.values()))
        asked = [
            actor.prepare.remote(
                str(rank_log(log_dir, rank)),
                address=node.address,
                is_alone=len(shares) == 1,
                environ=self._environment.secrets_of(rank),
            )
            for rank, (actor, node) in enumerate(started)
        ]
        try:
            pids = ask(asked, [node.address for _, node in started], interrupted)
        except WorkersLost:
            for actor, _ in started:
                ray.kill(actor)
            raise
        return [
            Worker(rank=rank, actor=actor, node=node, pid=pid, place=self._reserved[node.id][0])
            for rank, ((actor, node), pid) in enumerate(zip(started, pids, strict=True))
        ]

    def rendezvous(self, workers: list[Worker], interrupted: Callable[[], Failure | None]) -> str:
        """Returns a new address on the first rank's node at which the ranks can meet."""
        first = workers[0]
        (port,) = ask([first.actor.free_port.remote()], [first.node.address], interrupted)
        return f"tcp://{first.node.address}:{port}"

    def start_agent(self, node: Node, *, warnings: str) -> Any:
        """Returns a `NodeAgent` as an actor on a node."""
        return _Agent.options(
            num_cpus=0,
            max_concurrency=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote(warnings)

    def cleared(self, workers: Sequence[Worker]) -> list[Worker]:
        """Returns the idle processes that can be reused for another attempt."""
        asked = {worker.actor.clear.remote(): worker for worker in workers}
        ready = answered(list(asked), timeout=CLEAR_SECONDS, wait_for_all=True)
        return [asked[r] for r in ready if answer(r) is True]

    def end_workers(self, workers: Sequence[Worker]) -> None:
        """Ends the ranks' processes at once, whatever they are doing."""
        for worker in workers:
            ray.kill(worker.actor)

    def disconnect(self) -> None:
        """Releases the reservations, and ends Ray if it was started here."""
        if self._over is not None:
            self._over.set()
        with suppress(Exception):  # the cluster may be gone
            self.request(0, on_gpu=False)
            self._request_resources()
            self.give_back()
        ray.shutdown()
        self._closing.close()


def rank_log(log_dir: Path, rank: int) -> Path:
    """Returns the file that a rank writes to."""
    return log_dir / f"rank_{rank:03d}.log"


def _rank_resources(on_gpu: bool) -> dict[str, float]:
    return {"CPU": 1.0, **({"GPU": 1.0} if on_gpu else {})}


# Sent as source, so that an agent needn't import what this package imports.
ray.cloudpickle.register_pickle_by_value(launch.on_ray.node_agent)
_Agent: Any = ray.remote(NodeAgent)
