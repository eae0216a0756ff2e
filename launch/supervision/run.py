"""Ranks on Ray: the cluster that they run on, under a supervisor."""

import os
from collections.abc import Callable

from launch.environment import for_ranks
from launch.on_ray.cluster import RayCluster
from launch.plan import cluster_address
from launch.signals import StopRequest
from launch.supervision.supervisor import Supervisor
from moetrain.observe import ProgressDisplay
from moetrain.settings import Resolved
from moetrain.train.control import Outcome


def run_on_ray(
    config: Resolved,
    display: ProgressDisplay,
    stop: StopRequest,
    *,
    refit: Callable[[int], Resolved | None],
) -> Outcome:
    """Trains with supervised Ray actors, on a cluster or on this machine."""
    address = cluster_address(config.launch)
    display.phase(f"joining the Ray cluster at {address}" if address else "starting Ray, here only")
    cluster = RayCluster.connect(
        address,
        num_workers=config.launch.num_workers,
        allow_unauthenticated=config.launch.allow_unauthenticated,
        environment=for_ranks(
            os.environ, cluster_env=config.cluster.env, pass_env=config.launch.pass_env
        ),
    )
    supervisor = Supervisor(config, cluster, refit=refit, display=display, stop_requested=stop)
    try:
        return supervisor.run()
    finally:
        cluster.disconnect()
