"""The first optimizer step, and a resume's allocation of states, over sharded tensors."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks.scaling.case import Case
from moetrain.optim import allocate_state, build_optimizer
from moetrain.settings import OptimSettings


def _allocate(size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(os.fspath(folder / "store"), 1), rank=0, world_size=1
    )
    mesh = init_device_mesh("cpu", (1,))
    parameters = [
        nn.Parameter(distribute_tensor(torch.zeros(8, 8), mesh, [Shard(0)])) for _ in range(size)
    ]
    optimizer = build_optimizer(parameters, OptimSettings())
    allocate_state(optimizer)
    dist.destroy_process_group()


CASES = (
    Case(
        name="resume/optimizer_tensors",
        unit="tensors",
        sizes=(640, 2560, 10240),
        run=_allocate,
    ),
)
