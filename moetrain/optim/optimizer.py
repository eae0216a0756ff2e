"""Optimizers over sharded parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import adamw as torch_adamw

from moetrain.registries import OPTIMIZERS
from moetrain.settings import OptimSettings

Groups = list[dict[str, Any]]
"""Parameters in groups, as torch's optimizers take them, each with its `weight_decay`."""
OptimizerBuilder = Callable[[Groups, OptimSettings, Any], Optimizer]
"""Makes an optimizer from groups, the settings of `optim`, and its own options."""


@OPTIMIZERS.register("adamw")
def adamw(groups: Groups, settings: OptimSettings, options: None) -> Optimizer:
    """Returns AdamW (arXiv 1711.05101)."""
    return LocalAdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


class LocalAdamW(AdamW):
    """torch's fused AdamW, on this rank's parts of distributed tensors.

    Element by element the parts give what the whole would. torch would pass all tensors to one
    operator and work out for each how it is distributed by looking at all of them, so that the
    first step is quadratic in their number. The state is distributed as its parameter is.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes a step; `closure` is None."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in parameters]
            beta1, beta2 = group["betas"]
            torch_adamw.adamw(
                [_local(p) for p in parameters],
                [_local(p.grad) for p in parameters],
                [_local(state["exp_avg"]) for state in states],
                [_local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@OPTIMIZERS.register("sgd")
def sgd(groups: Groups, settings: OptimSettings, options: None) -> Optimizer:
    """Returns SGD, with momentum if it is set."""
    return SGD(groups, lr=settings.lr, momentum=settings.momentum)


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> Optimizer:
    """Returns the optimizer over parameters; vectors get no weight decay.

    Parameters of one group share a device mesh, because torch's foreach kernels take distributed
    tensors of one mesh at a time.
    """
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        key = (getattr(parameter, "device_mesh", None), parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    grouped = [
        {"params": group, "weight_decay": settings.weight_decay if decays else 0.0}
        for (_, decays), group in groups.items()
    ]
    build: OptimizerBuilder = OPTIMIZERS.get(settings.name).made
    options = OPTIMIZERS.typed_options(settings.name, settings.options)
    return build(grouped, settings, options)


def state_names(settings: OptimSettings) -> set[str]:
    """Returns the names of the optimizer's state for a matrix."""
    return set(_state_of_a_matrix(settings))


def state_size(settings: OptimSettings) -> float:
    """Returns how many numbers the optimizer keeps per element of a large matrix."""
    state = _state_of_a_matrix(settings, side := 16)
    return float(round(sum(tensor.numel() for tensor in state.values()) / side**2))


def _state_of_a_matrix(settings: OptimSettings, side: int = 1) -> dict[str, Tensor]:
    parameter = nn.Parameter(torch.zeros(side, side))
    optimizer = build_optimizer([parameter], settings)
    allocate_state(optimizer)
    state = optimizer.state.get(parameter, {})
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@torch.no_grad()
def allocate_state(optimizer: Optimizer) -> None:
    """Allocates the optimizer's state tensors without changing a parameter, to load values into.

    A step with zero gradients and a zero learning rate does that for every optimizer.
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
