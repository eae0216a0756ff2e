"""A rank's environment variables: set before anything else, in every way of starting.

torch reads most of them once, when it makes a process group or allocates on a device for the first
time; a variable that is set later has no effect and gives no error.
"""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import torch

from moetrain.settings import Resolved
from moetrain.train.control import RankPlace

ON_CUDA: Mapping[tuple[str, ...], str] = {
    # An MoE's tensors change size with every step. Without this the allocator's fixed segments fit
    # the next step's sizes badly, and memory is lost between them.
    ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"): "expandable_segments:True",
    # Experts' and FSDP's communicators are in flight at the same time. NCCL then runs their kernels
    # in the order in which the host launched them, which is the same on every rank.
    ("NCCL_LAUNCH_ORDER_IMPLICIT",): "1",
    # The collectives that a report of a hang lists. The report comes before torch's own timeout.
    ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
    ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
}
"""What ranks with CUDA get unless the user or `cluster.env` has set it under any of its names."""
DETERMINISTIC: Mapping[tuple[str, ...], str] = {
    # Otherwise cuBLAS takes workspaces, and with them orders of summation, by chance.
    ("CUBLAS_WORKSPACE_CONFIG",): ":4096:8",
    # NCCL chooses by the size of a message and by what it measures; each has its own order.
    ("NCCL_ALGO",): "Ring",
    ("NCCL_PROTO",): "Simple",
}
"""What they get as well with `train.deterministic`."""
DUMPS = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Where torch writes its record of collectives when one of them times out."""


def set_environment(
    config: Resolved, place: RankPlace, *, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Sets a rank's environment: `cluster.env`, and with CUDA the defaults of `ON_CUDA`.

    What the environment has already stays; under Ray that is `cluster.env` itself, and without Ray
    what the rank was started with.
    """
    for name, value in config.cluster.env.items():
        environ.setdefault(name, value)
    if rank_device(config.run.device).type != "cuda":
        return
    wanted = dict(ON_CUDA)
    if config.train.deterministic:
        wanted |= DETERMINISTIC
    if place.attempt:  # else the run has no name yet
        # torch appends the rank.
        wanted[DUMPS] = str(Path(config.run_dir, "logs", f"collectives_{place.attempt}_rank_"))
    for names, value in wanted.items():
        if not any(name in environ for name in names):
            environ[names[0]] = value


def compute_deterministically() -> None:
    """Makes torch take deterministic algorithms, and raise where an operator has none."""
    torch.use_deterministic_algorithms(True)
    # It would fill what it allocates with nan as well: that finds mistakes, and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property that the module gets when it is imported


def rank_device(name: str, *, index: int = 0) -> torch.device:
    """Returns the device of a setting for a rank, by its index on its machine."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", index)
    return torch.device("cpu")
