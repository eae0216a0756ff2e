"""Optimizers over sharded parameters."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from moetrain.settings import OptimSettings


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> Optimizer:
    """Returns the optimizer over parameters; vectors get no weight decay.

    Parameters of one group share a device mesh, because torch's fused and foreach kernels take
    distributed tensors of one mesh at a time.
    """
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        key = (getattr(parameter, "device_mesh", None), parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    grouped = [
        {"params": group, "weight_decay": settings.weight_decay if decays else 0.0}
        for (_, decays), group in groups.items()
    ]
    if settings.name == "sgd":
        return SGD(grouped, lr=settings.lr, momentum=settings.momentum)
    return AdamW(grouped, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def state_names(settings: OptimSettings) -> set[str]:
    """Returns what the optimizer keeps of each parameter, by torch's names."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer([parameter], settings)
    allocate_state(optimizer)
    state = optimizer.state.get(parameter, {})
    return {name for name, value in state.items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def allocate_state(optimizer: Optimizer) -> None:
    """Makes the optimizer's state tensors without changing a parameter, to load values into.

    A step with zero gradients and a zero rate is the one way that serves every optimizer.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
