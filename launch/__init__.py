"""Where ranks run: in this process, on Ray, or under somebody else's launcher."""

import moetrain  # noqa: F401 - before torch, which the modules below load
from launch.dry_run import dry_run, rehearsal_of
from launch.on_ray.cluster import ClusterError, RayCluster
from launch.plan import Plan, choose_plan, cluster_address, is_ray_copy, lasting
from launch.start import start
from launch.sweeps.runs import Trained, Wanted, assign, held, nearest_other, runs_in
from launch.sweeps.sweep import Elsewhere, Sweep, run_sweep, run_trial
from launch.sweeps.table import Result, Trial, preview_table, varied_settings

__all__ = [
    "ClusterError",
    "Elsewhere",
    "Plan",
    "RayCluster",
    "Result",
    "Sweep",
    "Trained",
    "Trial",
    "Wanted",
    "assign",
    "choose_plan",
    "cluster_address",
    "dry_run",
    "held",
    "is_ray_copy",
    "lasting",
    "nearest_other",
    "preview_table",
    "rehearsal_of",
    "run_sweep",
    "run_trial",
    "runs_in",
    "start",
    "varied_settings",
]
