"""Where the ranks of a command will run, and how many there will be."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.settings import home_folder
from launch.environment import for_ranks
from launch.external import TORCHRUN, ExternalRank, external_rank, meeting_point, visible_device
from launch.folders import require_ray_folder, settle_temporary_folder
from moetrain.checks import ConfigError
from moetrain.settings import LaunchSettings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who starts how many ranks: `inline`, `ray`, or `external` (torchrun, srun, mpirun)."""

    mode: str
    num_workers: int
    external: ExternalRank | None = None
    """This process as a rank of another launcher."""
    gpus_per_node: int | None = None
    """The GPUs of a machine of these ranks; None: there are none, or not yet."""


def choose_plan(settings: LaunchSettings, *, device: str) -> Plan:
    """Returns the plan that the settings and the environment ask for.

    Environment variables such as RANK and WORLD_SIZE say that another launcher has started the
    ranks. Raises ConfigError if the settings contradict that, or each other, or if a private Ray
    couldn't use its folder. Sets TMPDIR to an existing folder.
    """
    settle_temporary_folder()
    wanted = settings.num_workers
    for_ranks(os.environ, cluster_env={}, pass_env=settings.pass_env)  # refuses what isn't set
    if external := external_rank(os.environ):
        if settings.mode == "auto" and not _drives_cluster(settings, external):
            return _external(external, wanted, num_gpus=num_gpus(device))
        _require_first(external, settings)
    if settings.mode == "inline":
        if wanted not in (None, 1):
            raise ConfigError(
                "launch.num_workers", wanted, "launch.mode=inline runs one rank: use 1, or ray"
            )
        return Plan(mode="inline", num_workers=1, gpus_per_node=num_gpus(device) or None)
    if address := cluster_address(settings):
        from launch.on_ray.cluster import RayCluster

        # Also with a given number: an insecure cluster is refused before anything is written or
        # shards are built.
        cluster = RayCluster.connect(address, allow_unauthenticated=settings.allow_unauthenticated)
        wanted = wanted or cluster.fitting_workers()
        gpus_per_node = cluster.gpus_per_node() if device != "cpu" else None
    else:
        gpus_per_node = num_gpus(device) or None
        wanted = wanted or gpus_per_node or min(2, len(os.sched_getaffinity(0)))
    alone = settings.mode == "auto" and wanted == 1 and not address
    if not alone and not address:
        require_ray_folder()
    mode = "inline" if alone else "ray"
    return Plan(mode=mode, num_workers=wanted, gpus_per_node=gpus_per_node)


def _external(external: ExternalRank, wanted: int | None, *, num_gpus: int) -> Plan:
    started, counted = external.world_size, external.launcher.world_size
    if wanted not in (None, started):
        raise ConfigError(
            "launch.num_workers",
            wanted,
            f"the launcher above has started {started} ranks ({counted}): leave it open",
        )
    meeting_point(external, os.environ, arguments=sys.argv[1:])  # refuses what has none
    visible_device(external, os.environ, num_devices=num_gpus)  # refuses what would share one
    # As many ranks as a machine has GPUs, of which each may see one only.
    gpus = external.local_world_size if num_gpus else None
    return Plan(mode="external", num_workers=started, external=external, gpus_per_node=gpus)


def _drives_cluster(settings: LaunchSettings, external: ExternalRank) -> bool:
    """Returns whether a process of a job on several nodes is to drive a Ray cluster."""
    return external.launcher is not TORCHRUN and cluster_address(settings) is not None


def _require_first(external: ExternalRank, settings: LaunchSettings) -> None:
    """Raises ConfigError for a copy of a run that a launcher's first process starts."""
    if external.rank == 0:
        return
    if settings.mode == "auto":
        key, value, how = "launch.address", settings.address, "take `launch.address=local`"
    else:
        key, value, how = "launch.mode", settings.mode, "take `launch.mode=auto`"
    raise ConfigError(
        key,
        value,
        f"{external.launcher.name} has started {external.world_size} processes, this is number "
        f"{external.rank}, and each would begin the same run: start one, or {how}, with which "
        "they are its ranks",
    )


def cluster_address(settings: LaunchSettings) -> str | None:
    """Returns the address of the Ray cluster for the ranks; None: start one here.

    Without an address, or with `auto`, it is the cluster of the job that this process belongs to,
    else the cluster that `ray start` made this machine a node of. With `local` it is neither.
    """
    address = settings.address or "auto"
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        from launch.on_ray.access import running_cluster

        return running_cluster()
    return None if address == "local" else address


def persistent_folder(folder: str) -> Path:
    """Returns the absolute path of a folder for runs.

    In a Ray job the current folder may be Ray's copy of a working directory, which Ray may delete:
    there a relative path starts at the home folder.
    """
    here = Path.cwd()
    if Path(folder).is_absolute() or not is_ray_copy(here):
        return here / folder
    home = home_folder()
    if home is None:
        raise ConfigError(
            "run.dir",
            folder,
            "in a Ray job a relative path begins at the home folder, and there is none (HOME isn't "
            "set, and the user has no entry in the passwd file): give an absolute one",
        )
    return home / folder


def is_ray_copy(folder: Path) -> bool:
    """Returns whether a folder is Ray's own copy of a job's working directory."""
    return {"runtime_resources", "working_dir_files"} <= set(folder.parts)


def num_gpus(device: str) -> int:
    """Returns the number of CUDA devices that ranks on this machine can use with a `run.device`."""
    import torch  # takes seconds: `moetrain submit` doesn't wait for it

    usable = device != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if usable else 0
