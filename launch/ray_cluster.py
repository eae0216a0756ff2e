"""Ray, and only what the supervisor needs of it: a cluster, placed ranks, and their answers."""

import faulthandler
import logging
import os
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # ranks are the main job, not a background one
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave a CPU rank's CUDA alone

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.failure import Failure, classify
from moetrain.train import Control, Outcome, Place, run_rank

if TYPE_CHECKING:
    from moetrain.config import Config

CONNECT_TIMEOUT_SECONDS = 10.0
PLACEMENT_TIMEOUT_SECONDS = 60.0
START_TIMEOUT_SECONDS = 120.0
LOCAL_OBJECT_STORE_BYTES = 128 * 2**20  # ranks exchange tensors by themselves, not through Ray


class WorkersLost(Exception):
    """Ranks that ended, or didn't answer, before they began to train."""


class ClusterError(Exception):
    """A cluster that can't be reached, or doesn't have what the run needs."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One placed rank."""

    rank: int
    actor: Any
    node: str
    pid: int


class RayCluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, *, local: bool) -> None:
        self._local = local
        self._placement: PlacementGroup | None = None

    @classmethod
    def connect(cls, address: str | None, *, num_workers: int = 1) -> "RayCluster":
        """Connects to the cluster at an address, or without one starts Ray on this machine."""
        quiet: dict[str, Any] = {
            "logging_level": logging.ERROR,
            "log_to_driver": False,
            "ignore_reinit_error": True,
        }
        try:
            if address:
                _demand_listener(address)
                ray.init(address=address, **quiet)
            else:
                ray.init(
                    address="local",
                    num_cpus=max(num_workers, os.cpu_count() or 1),
                    include_dashboard=False,
                    object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                    **quiet,
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"launch.address={address or 'null'}: Ray can't be reached or started ({error})"
            ) from error
        return cls(local=not address)

    def fitting_workers(self) -> int:
        """Returns the number of ranks that the cluster has room for: its GPUs, else its CPUs."""
        resources = ray.cluster_resources()
        return int(resources.get("GPU") or resources.get("CPU", 1))

    def has_gpus(self) -> bool:
        """Returns whether any node has a GPU; the driver's own machine may have none."""
        return bool(ray.cluster_resources().get("GPU"))

    def place(self, num_workers: int, *, on_gpu: bool) -> None:
        """Reserves a place for each rank; raises ClusterError naming what is missing."""
        bundle: dict[str, float] = {"CPU": 1.0, **({"GPU": 1.0} if on_gpu else {})}
        group = placement_group([bundle] * num_workers, strategy="PACK")
        if not group.wait(PLACEMENT_TIMEOUT_SECONDS):
            remove_placement_group(group)
            has = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
            raise ClusterError(
                f"launch.num_workers={num_workers}: each worker needs {bundle}, but the cluster "
                f"has {has} in {len(ray.nodes())} nodes"
            )
        self._placement = group

    def start_workers(
        self, num_workers: int, *, on_gpu: bool, log_dir: Path, env: dict[str, str]
    ) -> list[Worker]:
        """Starts a fresh process for each rank; ranks of one node have neighbouring numbers.

        Raises WorkersLost where one of them dies or isn't placed in time.
        """
        assert self._placement is not None
        actors = [
            _RankActor.options(  # type: ignore[attr-defined]
                num_cpus=1,
                num_gpus=1 if on_gpu else 0,
                max_concurrency=4,  # training, and questions to it at the same time
                runtime_env={"env_vars": env} if env else None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=index
                ),
            ).remote()
            for index in range(num_workers)
        ]
        try:
            return self._placed(actors, log_dir=log_dir)
        except WorkersLost:
            for actor in actors:
                ray.kill(actor)
            raise

    def _placed(self, actors: list[Any], *, log_dir: Path) -> list[Worker]:
        num_workers = len(actors)
        places = _ask([actor.whereabouts.remote() for actor in actors])
        order = sorted(range(num_workers), key=lambda index: (places[index][0], index))
        workers = [
            Worker(rank=rank, actor=actors[i], node=places[i][0], pid=places[i][1])
            for rank, i in enumerate(order)
        ]
        _ask([w.actor.log_to.remote(str(log_dir / f"rank_{w.rank:03d}.log")) for w in workers])
        return workers

    def rendezvous(self, workers: list[Worker]) -> str:
        """Returns a fresh address on the first rank's node at which the ranks can meet."""
        host, port = _ask(workers[0].actor.free_address.remote())
        return f"tcp://{host}:{port}"

    def end_workers(self, workers: list[Worker]) -> None:
        """Ends the ranks' processes at once, whatever they are doing."""
        for worker in workers:
            ray.kill(worker.actor)

    def disconnect(self) -> None:
        """Gives the places back, and ends Ray if it was started here."""
        if self._placement:
            remove_placement_group(self._placement)
        ray.shutdown()


def running_cluster() -> str | None:
    """Returns the address of the cluster that `ray start` has made this machine a node of, if any.

    Ray's own `auto` also finds the private Ray of any other program on the machine, and a cluster
    that ended without `ray stop`.
    """
    address = ray._private.services.find_bootstrap_address(None)  # type: ignore[attr-defined]
    try:
        _demand_listener(address or "")
    except OSError:
        return None
    return address or None


def _demand_listener(address: str) -> None:
    """Raises OSError where nobody listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_SECONDS).close()


def _ask(references: Any) -> Any:
    try:
        return ray.get(references, timeout=START_TIMEOUT_SECONDS)
    except ray.exceptions.RayError as error:
        raise WorkersLost(f"a rank was lost while it started: {_first_line(error)}") from error


def answered(references: list[Any], *, timeout: float, wait_for_all: bool = False) -> list[Any]:
    """Returns those of the references that have an answer or an error.

    Waits for the first of them, or for all, but no longer than `timeout` seconds.
    """
    ray.wait(references, num_returns=len(references) if wait_for_all else 1, timeout=timeout)
    return list(ray.wait(references, num_returns=len(references), timeout=0)[0])


def answer(reference: Any) -> Any:
    """Returns an answer; a Failure where the rank's process is gone."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError as error:
        preempted = bool(getattr(error, "preempted", False))
        return Failure(kind="preempted" if preempted else "died", reason=_first_line(error))
    except ray.exceptions.RayError as error:
        return Failure(kind="died", reason=_first_line(error))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


@ray.remote(max_restarts=0, max_task_retries=0)
class _RankActor:
    """The process of one rank. Training runs in one of its threads; others answer questions."""

    def __init__(self) -> None:
        self._control = Control()

    def whereabouts(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), os.getpid()

    def log_to(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        faulthandler.enable(file=sys.stderr)
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, force=True,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )  # fmt: skip

    def free_address(self) -> tuple[str, int]:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run(self, config: "Config", place: Place) -> Outcome | Failure:
        try:
            return run_rank(config, place, self._control)
        except BaseException as error:
            traceback.print_exc()
            return classify(error)

    def collect(self) -> dict[str, Any]:
        return self._control.collect()

    def stop(self) -> None:
        self._control.request_stop()

    def stacks(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return "\n".join(
            f"thread {names.get(ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
        )
