"""Where the ranks of a command will run, and how many there will be."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.environment import for_ranks
from launch.settings import LaunchSettings
from moetrain.checks import ConfigError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who starts how many ranks: `inline`, `ray`, or `external` (torchrun, srun)."""

    mode: str
    num_workers: int


def choose_plan(settings: LaunchSettings, *, device: str) -> Plan:
    """Returns the plan that the settings and the environment mean.

    RANK and WORLD_SIZE in the environment say that another launcher has started the ranks.
    Raises ConfigError where the settings contradict that, or themselves.
    """
    wanted = settings.num_workers
    for_ranks(os.environ, cluster_env={}, pass_env=settings.pass_env)  # refuses what isn't set
    if settings.mode == "auto" and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        started = int(os.environ["WORLD_SIZE"])
        if wanted not in (None, started):
            raise ConfigError(
                "launch.num_workers",
                wanted,
                f"the launcher above has started {started} ranks (WORLD_SIZE): leave it open",
            )
        return Plan(mode="external", num_workers=started)
    if settings.mode == "inline":
        if wanted not in (None, 1):
            raise ConfigError(
                "launch.num_workers", wanted, "launch.mode=inline runs one rank: use 1, or ray"
            )
        return Plan(mode="inline", num_workers=1)
    if address := cluster_address(settings):
        from launch.ray_cluster import RayCluster

        # Also with a number given: a cluster that mustn't be used is refused before anything is
        # written, and before shards are built for it.
        cluster = RayCluster.connect(address, allow_unauthenticated=settings.allow_unauthenticated)
        wanted = wanted or cluster.fitting_workers()
    wanted = wanted or _local_workers(device)
    alone = settings.mode == "auto" and wanted == 1 and not address
    return Plan(mode="inline" if alone else "ray", num_workers=wanted)


def cluster_address(settings: LaunchSettings) -> str | None:
    """Returns the address of the Ray cluster that the ranks run on; None: one started here.

    Without an address, or with `auto`, it is the cluster that this process is a job of, else the
    one that `ray start` has made this machine a node of. With `local` it is none of them.
    """
    address = settings.address or "auto"
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        from launch.ray_access import running_cluster

        return running_cluster()
    return None if address == "local" else address


def lasting(folder: str) -> Path:
    """Returns the absolute path of a folder that runs are kept in.

    In a Ray job the current folder may be Ray's copy of a working directory, which it deletes when
    it likes: there a relative path starts at the home folder.
    """
    here = Path.cwd()
    return (Path.home() if is_ray_copy(here) else here) / folder


def is_ray_copy(folder: Path) -> bool:
    """Returns whether a folder is Ray's own copy of a job's working directory."""
    return {"runtime_resources", "working_dir_files"} <= set(folder.parts)


def _local_workers(device: str) -> int:
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(2, len(os.sched_getaffinity(0)))
