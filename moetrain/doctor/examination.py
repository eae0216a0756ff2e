"""Tests of the expert backends, and what this machine has.

Each backend runs a small layer forward and backward, and is compared with a float64 loop. The
reasons why a backend can't run are the backends'.
"""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moetrain.kernels import slow_because, unavailable_because
from moetrain.kernels.known_answer import Answer, answer_of

LIBRARIES = (
    "triton", "megablocks", "stanford-stk", "numpy", "ray", "wandb", "webdataset", "hydra-core"
)  # fmt: skip
GIB = 2**30


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
        "advice": advice(works),
        "process_groups": {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()},
        "room": {
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
            "free_memory_gib": _free_memory(),
            "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        },
    }


def advice(works: list[str]) -> str | None:
    """Returns what would make training faster here, if anything would."""
    if not torch.cuda.is_available() or "megablocks" in works:
        return None
    return slow_because(torch.cuda.get_device_capability(), torch.bfloat16)


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
    answer = Answer(None, 0.0, refused)
    if refused is None:
        answer = answer_of(name, device=device, dtype=dtype)
    return {
        "name": name,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "works": answer.reason is None,
        "error": answer.error,
        "tolerance": answer.tolerance,
        "reason": answer.reason,
    }
