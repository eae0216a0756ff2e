"""Tests of the expert backends, and what this machine has.

Each backend runs a small layer forward and backward, and is compared with a float64 loop. The
reasons why a backend can't run are the backends'.
"""

import math
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels import expert_swiglu, group_assignments, unavailable_because

LIBRARIES = (
    "triton", "megablocks", "stanford-stk", "numpy", "ray", "wandb", "webdataset", "hydra-core"
)  # fmt: skip
GIB = 2**30
DIM = 128  # of the trial layer, and its hidden size: one block of MegaBlocks' kernels


def examine() -> dict[str, Any]:
    """Returns versions, devices, backends, process groups and room, ready for JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = [
        _tried("megablocks", device, unavailable_because(device)),
        _tried("grouped_mm", device),
        _tried("cpu", "cpu"),
    ]
    works = [str(backend["name"]) for backend in backends if backend["works"]]
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in LIBRARIES},
        },
        "devices": [_cuda_device(index) for index in range(torch.cuda.device_count())],
        "backends": backends,
        "auto": auto_choice(works, device=device),
        "process_groups": {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()},
        "room": {
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
            "free_memory_gib": _free_memory(),
            "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        },
    }


def auto_choice(works: list[str], *, device: str) -> str | None:
    """Returns what `model.experts.backend=auto` takes on a device, of the backends that work."""
    on_device = ["megablocks", "grouped_mm"] if device == "cuda" else ["cpu"]
    able = [name for name in on_device if name in works]
    if len(able) == 2:
        return "the faster of megablocks and grouped_mm for the shape"
    return able[0] if able else None


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _cuda_device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": f"cuda:{index}",
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / GIB, 1),
    }


def _free_memory() -> float | None:
    """Returns the GiB that programs can have without swapping, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return round(int(kib) * 1024 / GIB, 1) if kib else None


def _tried(
    name: str, device: str, refused: str | None = None
) -> dict[str, str | float | bool | None]:
    """Returns whether a backend runs on a device and is right, or else why not."""
    # A run's compute dtype: bfloat16 on a GPU; Triton's interpreter can't multiply bfloat16.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # Each of the five products from an input to a gradient sums in float32 and rounds to dtype.
    eps = torch.finfo(torch.float32).eps
    tolerance = 5 * (torch.finfo(dtype).eps + eps * math.sqrt(DIM))
    error, reason = None, refused
    if refused is None:
        try:
            error = _largest_error(name, device=device, dtype=dtype)
        except Exception as raised:  # the user wants to see whatever a kernel raises
            reason = f"{type(raised).__name__}: {raised}"
        else:
            if not error <= tolerance:
                reason = f"its results are wrong: off by {error:.1e}, allowed are {tolerance:.1e}"
    return {
        "name": name,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "works": reason is None,
        "error": error,
        "tolerance": tolerance,
        "reason": reason,
    }


def _largest_error(backend: str, *, device: str, dtype: torch.dtype) -> float:
    """Returns the largest relative error, in norm, of output and gradients of a small layer.

    Four rows, each at two of three experts; the last expert has none.
    """
    assignments = group_assignments(torch.tensor([[0, 1]] * 4, device=device), num_groups=3)
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 4, DIM, generator=generator).to(dtype)
    gates = torch.rand(8, generator=generator)
    weights = (torch.randn(3, 3, DIM, DIM, generator=generator) / math.sqrt(DIM)).to(dtype)

    exact = [tensor.double().requires_grad_() for tensor in (x, gates, *weights)]
    expected = [_dense(*exact)]
    expected += torch.autograd.grad(expected[0], exact, grad.double())

    inputs = [tensor.to(device).requires_grad_() for tensor in (x, gates, *weights)]
    rows, row_gates, gate, up, down = inputs
    out = expert_swiglu(rows, row_gates, assignments, gate, up, down, backend=backend)
    ours = [out, *torch.autograd.grad(out, inputs, grad.to(device))]
    errors = [
        torch.dist(mine.detach().cpu().double(), theirs.detach())
        / torch.linalg.vector_norm(theirs.detach())
        for mine, theirs in zip(ours, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def _dense(x: Tensor, gates: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Returns the trial's output by plain products: all four rows at experts 0 and 1."""
    parts = [
        ((F.silu(x @ gate[e].t()) * (x @ up[e].t())) @ down[e]) * gates[4 * e : 4 * e + 4, None]
        for e in range(2)
    ]
    return parts[0] + parts[1]
