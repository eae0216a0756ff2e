"""Optimizers over sharded parameters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import adamw as torch_adamw

from moetrain.local_part import local_part
from moetrain.model.roles import Role
from moetrain.registries import OPTIMIZERS
from moetrain.settings import GroupSettings, GroupsSettings, OptimSettings

Groups = list[dict[str, Any]]
"""Parameters in groups, as torch's optimizers take them.

Each has its `weight_decay`, its `role` in the model, and `lr_factor`, a factor of the learning rate
that the step applies.
"""
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
                [local_part(p) for p in parameters],
                [local_part(p.grad) for p in parameters],
                [local_part(state["exp_avg"]) for state in states],
                [local_part(state["exp_avg_sq"]) for state in states],
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


@OPTIMIZERS.register("sgd")
def sgd(groups: Groups, settings: OptimSettings, options: None) -> Optimizer:
    """Returns SGD, with momentum if it is set."""
    return SGD(groups, lr=settings.lr, momentum=settings.momentum)


class SeveralOptimizers(Optimizer):
    """Optimizers of different parameters as one: their groups, their states, one step."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        # Muon is several by itself: all have this one state, of which a checkpoint is made.
        self._parts: list[Optimizer] = [
            single
            for part in parts
            for single in (part._parts if isinstance(part, SeveralOptimizers) else [part])
        ]
        for part in self._parts:  # each finds its own parameters there
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes a step of each; `closure` is None."""
        for part in self._parts:
            part.step()


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    settings: OptimSettings,
    *,
    roles: Mapping[nn.Parameter, Role] | None = None,
) -> Optimizer:
    """Returns the optimizer over the parameters that aren't frozen; vectors get no weight decay.

    A group has parameters of one role, one optimizer and one device mesh, because torch's foreach
    kernels take distributed tensors of one mesh at a time. Beside `weight_decay` it has its `role`
    and its `lr_factor`, by which whoever sets the learning rate multiplies it. Without `roles`, as
    for single tensors, `settings.groups` must have its defaults.
    """
    assert roles is not None or settings.groups == GroupsSettings(), "the groups need roles"
    groups: dict[tuple[object, Role | None, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            role = roles[parameter] if roles else None
            key = (getattr(parameter, "device_mesh", None), role, parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    by_optimizer: dict[tuple[str, str], Groups] = {}
    for (_, role, decays), members in groups.items():
        own = group_settings(settings, role)
        name, options = _optimizer_of(settings, own)
        by_optimizer.setdefault((name, repr(options)), []).append(
            {
                "params": members,
                "weight_decay": settings.weight_decay * own.weight_decay_factor if decays else 0.0,
                "lr_factor": own.lr_factor,
                "role": role,
            }
        )
    built = []
    for (name, _), grouped in by_optimizer.items():
        build: OptimizerBuilder = OPTIMIZERS.get(name).made
        own = group_settings(settings, grouped[0]["role"])
        options = OPTIMIZERS.typed_options(name, _optimizer_of(settings, own)[1])
        built.append(build(grouped, settings, options))
    return built[0] if len(built) == 1 else SeveralOptimizers(built)


def group_settings(settings: OptimSettings, role: Role | None) -> GroupSettings:
    """Returns how the parameters of a role are trained."""
    return GroupSettings() if role is None else getattr(settings.groups, role)


def _optimizer_of(settings: OptimSettings, group: GroupSettings) -> tuple[str, Mapping[str, Any]]:
    """Returns the name and the options of a group's optimizer."""
    if group.optimizer is None:
        return settings.name, settings.options
    return group.optimizer, group.options


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets the learning rate of the next step: for each group, times its factor."""
    for group in optimizer.param_groups:
        # A group of an extension's own making has no factor.
        group["lr"] = rate * group.get("lr_factor", 1.0)


def state_names(
    settings: OptimSettings, role: Role | None = None, *, vectors: bool = False
) -> set[str]:
    """Returns the names of the optimizer's state for a matrix, of a role if one is given.

    With `vectors`, also of those for a vector, which may be another optimizer's.
    """
    names = set(_state_of_one(settings, role, shape=(1, 1)))
    return names | set(_state_of_one(settings, role, shape=(1,))) if vectors else names


def state_size(settings: OptimSettings, role: Role | None = None) -> float:
    """Returns how many numbers the optimizer keeps per element of a large matrix of a role."""
    side = 16
    state = _state_of_one(settings, role, shape=(side, side))
    return float(round(sum(tensor.numel() for tensor in state.values()) / side**2))


def _state_of_one(
    settings: OptimSettings, role: Role | None, *, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """Returns what the optimizer keeps for a parameter of a shape."""
    own = group_settings(settings, role)
    if own.frozen:
        return {}
    parameter = nn.Parameter(torch.zeros(shape))
    plain = replace(settings, groups=GroupsSettings())
    if own.optimizer is not None:
        plain = replace(plain, name=own.optimizer, options=own.options)
    roles = None if role is None else {parameter: role}
    optimizer = build_optimizer([parameter], plain, roles=roles)
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
