"""This process as a rank of another launcher: torchrun, Slurm's srun, an MPI's mpirun.

A launcher that starts N processes starts one run of N ranks. If it doesn't say where they meet,
each process refuses to start: alone it would train one of N copies. Starts nothing.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.checks import ConfigError
from moetrain.redaction import redacted_arguments

_PORTS = range(15_000, 30_000)  # below the ports of outgoing connections
_PORTS_A_JOB = 64
_FIRST_OF_SLURMS_OWN_STEPS = 0xFFFF_FF00  # a batch script, an interactive shell
_HERE = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A launcher, and the variables that number its processes."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str = ""
    """Empty: the launcher doesn't say."""
    line: str = ""
    """A command that starts usable ranks: `size` of them, which meet at `host`."""


TORCHRUN = Launcher(
    name="another launcher",
    rank="RANK", world_size="WORLD_SIZE", local_rank="LOCAL_RANK",
    local_world_size="LOCAL_WORLD_SIZE",
    line="torchrun --standalone --nproc-per-node={size} -m moetrain",
)  # fmt: skip
SLURM = Launcher(
    name="srun",
    rank="SLURM_PROCID", world_size="SLURM_STEP_NUM_TASKS", local_rank="SLURM_LOCALID",
)  # fmt: skip
MPI = (
    Launcher(
        name="Open MPI's mpirun",
        rank="OMPI_COMM_WORLD_RANK", world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK", local_world_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        line="mpirun -x MASTER_ADDR={host} -x MASTER_PORT=29500",
    ),
    Launcher(
        name="MVAPICH's mpirun",
        rank="MV2_COMM_WORLD_RANK", world_size="MV2_COMM_WORLD_SIZE",
        local_rank="MV2_COMM_WORLD_LOCAL_RANK", local_world_size="MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        name="jsrun",
        rank="JSM_NAMESPACE_RANK", world_size="JSM_NAMESPACE_SIZE",
        local_rank="JSM_NAMESPACE_LOCAL_RANK", local_world_size="JSM_NAMESPACE_LOCAL_SIZE",
    ),
    Launcher(
        name="an MPI's mpiexec",
        rank="PMI_RANK", world_size="PMI_SIZE", local_rank="MPI_LOCALRANKID",
        local_world_size="MPI_LOCALNRANKS",
        line="mpiexec -n {size} -genv MASTER_ADDR {host} -genv MASTER_PORT 29500 "
             "python -m moetrain",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExternalRank:
    """The number of this process among a launcher's ranks."""

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int | None
    """Its number on its machine; None: nothing says."""
    local_world_size: int


def external_rank(environ: Mapping[str, str]) -> ExternalRank | None:
    """Returns this process's rank under another launcher; None: it is on its own.

    A launcher's only process is on its own too, unless torchrun has given it an address to meet at.
    A process that Ray started on a node has the variables of Ray's own task, and is no rank. Raises
    ConfigError for impossible numbers.
    """
    task = _slurm_task(environ)
    for launcher in (TORCHRUN, *MPI):
        if launcher.rank in environ and launcher.world_size in environ:
            found = _rank_of(launcher, environ, task)
            # Slurm's tasks have PMI's numbers too, but only Slurm says where they are.
            if launcher in MPI and task and found.world_size == task.world_size:
                return task
            if launcher in MPI and (found.world_size == 1 or _is_of_ray(os.getpid())):
                return None
            alone = found.world_size == 1 and "MASTER_ADDR" not in environ
            return None if alone else found
    if "PMIX_RANK" in environ and task is None and "SLURM_JOB_ID" not in environ:
        raise ConfigError(
            "PMIX_RANK",
            environ["PMIX_RANK"],
            "a launcher has started this process and doesn't say how many there are: set RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each of them, or "
            "`unset PMIX_RANK` for a run of its own",
        )
    return task


def meeting_point(
    rank: ExternalRank, environ: Mapping[str, str], *, arguments: Sequence[str]
) -> dict[str, str]:
    """Returns MASTER_ADDR and MASTER_PORT, where a launcher's ranks meet.

    `arguments` are the command's. Raises ConfigError if neither the environment nor Slurm knows
    them.
    """
    given = {n: environ[n] for n in ("MASTER_ADDR", "MASTER_PORT") if environ.get(n)}
    if rank.launcher is SLURM:
        return {"MASTER_ADDR": given.get("MASTER_ADDR") or _slurm_host(environ),
                "MASTER_PORT": given.get("MASTER_PORT") or str(slurm_port(environ))}  # fmt: skip
    if missing := [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in given]:
        raise ConfigError(missing[0], "(missing)", _how_to_meet(rank, arguments))
    return given


def _how_to_meet(rank: ExternalRank, arguments: Sequence[str]) -> str:
    launcher, size = rank.launcher, rank.world_size
    here = rank.local_world_size == size
    line = launcher.line.format(size=size, host=_HERE if here else "HOST")
    if launcher is TORCHRUN:
        command = shlex.join([*line.split(), *redacted_arguments(list(arguments))])
        how = f"use `{command}`"
    elif line:
        how = f"set it by `{line}` and run the same command"
        how += "" if here else ", HOST being the first rank's"
    else:
        how = "set MASTER_ADDR, the first rank's host, and MASTER_PORT for all of them"
    return (
        f"{launcher.name} has started {size} ranks ({launcher.world_size}) and doesn't say where "
        f"they meet: {how}; `unset {launcher.rank} {launcher.world_size}` for a run of its own"
    )


def _rank_of(
    launcher: Launcher, environ: Mapping[str, str], task: ExternalRank | None
) -> ExternalRank:
    rank, size = _number(environ, launcher.rank), _number(environ, launcher.world_size)
    if rank >= size:
        raise ConfigError(
            launcher.rank, rank, f"isn't a rank of {size} ({launcher.world_size}={size})"
        )
    # RANK and WORLD_SIZE are often set by hand for Slurm's tasks or an MPI's ranks, without the
    # others. What counts other processes than these says nothing about them.
    local_rank, local_size = None, size
    if task and task.world_size == size:
        local_rank, local_size = task.local_rank, task.local_world_size
    same = [mpi for mpi in MPI if environ.get(mpi.world_size) == str(size)]
    for one in (*same, launcher):
        if one.local_rank in environ:
            local_rank = _number(environ, one.local_rank)
        if one.local_world_size in environ:
            local_size = _number(environ, one.local_world_size)
    return ExternalRank(
        launcher=launcher, rank=rank, world_size=size, local_rank=local_rank,
        local_world_size=local_size,
    )  # fmt: skip


def visible_device(rank: ExternalRank, environ: Mapping[str, str], *, num_devices: int) -> int:
    """Returns which of the CUDA devices that this process sees is its rank's.

    A launcher may show each rank its own device only (Slurm's --gpus-per-task), which then has the
    number 0. Raises ConfigError where two ranks would get one device, or a rank one that isn't
    there.
    """
    if num_devices <= 1:
        return 0
    if rank.local_rank is None:
        raise ConfigError(
            rank.launcher.local_rank,
            "(missing)",
            f"each of {rank.world_size} ranks sees {num_devices} GPUs, and nothing says which is "
            "its own: set LOCAL_RANK for each rank, its number on its machine from 0 on (torchrun, "
            "srun and mpirun count by themselves), or show each rank one GPU by "
            "CUDA_VISIBLE_DEVICES",
        )
    if rank.local_rank >= num_devices:
        shown = environ.get("CUDA_VISIBLE_DEVICES")
        which = f" (CUDA_VISIBLE_DEVICES={shown})" if shown else ""
        raise ConfigError(
            rank.launcher.local_rank,
            rank.local_rank,
            f"this rank sees {num_devices} GPUs{which}: start at most {num_devices} ranks on a "
            "machine, or show each rank one GPU (srun --gpus-per-task=1)",
        )
    return rank.local_rank


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ[name].strip()
    if not value.isdecimal():
        raise ConfigError(name, environ[name], "must be a number, as its launcher sets it")
    return int(value)


def _slurm_task(environ: Mapping[str, str]) -> ExternalRank | None:
    """Returns which of a Slurm step's tasks this process is, if it is one.

    A batch script and a shell of `salloc` are no tasks, whatever SLURM_NTASKS says.
    """
    named = {SLURM.rank, SLURM.world_size, SLURM.local_rank, "SLURM_STEP_ID"}
    if not named <= environ.keys() or _number(environ, SLURM.world_size) == 1:
        return None
    if _number(environ, "SLURM_STEP_ID") >= _FIRST_OF_SLURMS_OWN_STEPS or _is_of_ray(os.getpid()):
        return None
    size = _number(environ, SLURM.world_size)
    by_node = list(tasks_by_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(size))))
    node = int(environ.get("SLURM_NODEID", "0"))
    return ExternalRank(
        launcher=SLURM,
        rank=_number(environ, SLURM.rank),
        world_size=size,
        local_rank=_number(environ, SLURM.local_rank),
        local_world_size=by_node[node] if node < len(by_node) else size,
    )


def _is_of_ray(pid: int) -> bool:
    """Returns whether Ray started this process: as a job, a worker, or with `symmetric-run`."""
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            return False
        if re.search(rb"\bray symmetric-run\b|^ray::|/raylet ", command):
            return True
        pid = int(stat.rpartition(")")[2].split()[1])
    return False


def tasks_by_node(counts: str) -> Iterator[int]:
    """Yields the number of tasks on each node from Slurm's `2(x3),1`."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        yield from [int(count)] * int(times or 1)


def first_host(nodes: str) -> str:
    """Returns the first name of Slurm's list of nodes, such as `gpu[007-009,012],login1`."""
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", name[0]) if name else nodes


def slurm_port(environ: Mapping[str, str]) -> int:
    """Returns a port for a step's ranks: different for each step of a job, and for the next
    jobs."""
    job, step = int(environ.get("SLURM_JOB_ID", "0")), _number(environ, "SLURM_STEP_ID")
    return _PORTS[(job * _PORTS_A_JOB + step) % len(_PORTS)]


def _slurm_host(environ: Mapping[str, str]) -> str:
    """Returns the address of a step's first node, which runs its first task."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if not nodes or environ.get("SLURM_STEP_NUM_NODES") == "1":
        return _HERE
    name = first_host(nodes)
    if _resolves(name):
        return name
    address = _configured_address(name)
    if address and _resolves(address):
        return address
    raise ConfigError(
        "MASTER_ADDR",
        "(missing)",
        f"the name of the step's first node, {name} (SLURM_STEP_NODELIST), can't be resolved here: "
        "`export MASTER_ADDR=` its address before srun",
    )


def _configured_address(node: str) -> str | None:
    """Returns a node's address in Slurm's configuration."""
    if not shutil.which("scontrol"):
        return None
    asked = ["scontrol", "show", "node", node, "--oneliner"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
    found = re.search(r"\bNodeAddr=(\S+)", done.stdout)
    return found[1] if found else None


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False
