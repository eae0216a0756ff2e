"""AdamW on this rank's parts: the bits of torch's on distributed tensors, in linear time."""

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.optim import AdamW, Optimizer

from moetrain.optim import allocate_state, build_optimizer
from moetrain.settings import OptimSettings
from tests.support.ranks import run_ranks

SETTINGS = OptimSettings(lr=0.01, weight_decay=0.5, betas=(0.8, 0.6), eps=1e-6)


def distributed(
    mesh: DeviceMesh, shape: tuple[int, ...], placement: Placement, *, seed: int
) -> Tensor:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return distribute_tensor(whole, mesh, [placement])


def layout(mesh: DeviceMesh) -> list[nn.Parameter]:
    """Matrices with uneven shards, an empty one, a replica, experts, and a vector."""
    kinds: list[tuple[tuple[int, ...], Placement]] = [
        ((5, 4), Shard(0)), ((4, 3), Shard(1)), ((1, 6), Shard(0)), ((3, 3), Replicate()),
        ((4, 2, 3), Shard(0)), ((7,), Shard(0)),
    ]  # fmt: skip
    return [
        nn.Parameter(distributed(mesh, shape, placement, seed=seed))
        for seed, (shape, placement) in enumerate(kinds)
    ]


def step_both() -> tuple[list[str], set[str]]:
    """Returns what differs between our steps and torch's, and the kinds of our state's tensors."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    ours, theirs = layout(mesh), layout(mesh)
    optimizer = build_optimizer(ours, SETTINGS)
    groups = [
        {"params": [p for p in theirs if (p.ndim > 1) is decays], "weight_decay": decay}
        for decays, decay in ((True, 0.5), (False, 0.0))
    ]
    of_torch: Optimizer = AdamW(groups, lr=0.01, betas=(0.8, 0.6), eps=1e-6, fused=True)
    differing, kinds = [], set[str]()
    for step in range(3):
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if (step, n) != (1, 2):  # a parameter without a gradient keeps its state and value
                assert isinstance(a, DTensor)
                grad = distributed(mesh, tuple(a.shape), a.placements[0], seed=100 * step + n)
                a.grad, b.grad = grad.clone(), grad.clone()
        optimizer.step()
        of_torch.step()
        optimizer.zero_grad()
        of_torch.zero_grad()
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            pairs = {"weight": (a, b)} | {
                key: (value, of_torch.state[b][key]) for key, value in optimizer.state[a].items()
            }
            assert optimizer.state[a].keys() == of_torch.state[b].keys()
            for key, (x, y) in pairs.items():
                if key != "weight":
                    kinds.add(f"{key}: {type(x).__name__}")
                same = type(x) is type(y) and x.dtype == y.dtype and x.shape == y.shape
                if isinstance(x, DTensor) and isinstance(y, DTensor):
                    same = same and x.placements == y.placements
                    x, y = x.to_local(), y.to_local()
                if not (same and torch.equal(x, y)):
                    differing.append(f"{key} of {n} after step {step}")
    return differing, kinds


@pytest.mark.trap(33)
def test_a_step_on_local_parts_gives_the_bits_of_torch_s_on_distributed_tensors() -> None:
    for differing, kinds in run_ranks(step_both, 2):
        assert not differing
        assert kinds == {"step: Tensor", "exp_avg: DTensor", "exp_avg_sq: DTensor"}


def calls_of_allocating(num_tensors: int) -> int:
    """Returns the lines of DTensor's own code that allocating an optimizer's state takes."""
    mesh = init_device_mesh("cpu", (1,))
    weights = [
        nn.Parameter(distributed(mesh, (4, 2 + n), Shard(0), seed=n)) for n in range(num_tensors)
    ]
    optimizer = build_optimizer(weights, SETTINGS)
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if "distributed/tensor" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        allocate_state(optimizer)
    finally:
        sys.settrace(None)
    assert len(optimizer.state) == num_tensors
    return lines


def test_allocating_the_state_of_ten_times_as_many_tensors_takes_ten_times_as_much() -> None:
    ((few, many),) = run_ranks(_few_and_many, 1)
    assert many < 1.1 * 10 * few


def _few_and_many() -> tuple[int, int]:
    calls_of_allocating(2)
    return calls_of_allocating(20), calls_of_allocating(200)
