"""Muon (Jordan et al. 2024; arXiv 2502.16982): the momentum of a matrix, orthogonalised.

The matrices inside the layers are moved by it: those of attention, dense layers, shared experts,
and each expert's. Embedding, head, routers and vectors are AdamW's, as is usual. The rate is
scaled so that an update has the size of AdamW's (arXiv 2502.16982, section 2.2): learning rate and
weight decay of AdamW serve.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from moetrain.local_part import local_part
from moetrain.model.roles import Role
from moetrain.optim.optimizer import (
    Groups,
    LocalAdamW,
    SeveralOptimizers,
    group_settings,
)
from moetrain.registries import OPTIMIZERS
from moetrain.settings import OptimSettings
from moetrain.settings.optim import Decay

ROLES = frozenset({Role.attention, Role.dense, Role.shared_experts, Role.experts})
"""The roles whose matrices Muon moves."""
COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the odd polynomial that brings singular values near one, as in torch.optim.Muon."""
_SMALLEST_NORM = 1e-7


@dataclass(frozen=True)
class MuonOptions:
    """`optim.options.…` of Muon."""

    momentum: Decay = 0.95
    nesterov: bool = True
    iterations: Annotated[int, Interval(ge=1, lt=100)] = 5
    """Newton–Schulz iterations."""
    exact: bool = False
    """Whether they are computed in float32 on GPUs too, where bfloat16 is the usual; a CPU always
    uses float32."""


def moved_by(settings: OptimSettings, role: Role) -> str | None:
    """Returns the name of the optimizer of a role's matrices; None where they are frozen."""
    own = group_settings(settings, role)
    name = own.optimizer or settings.name
    if own.frozen:
        return None
    return "adamw" if name == "muon" and role not in ROLES else name


class Muon(Optimizer):
    """Muon over matrices [rows, columns], and stacks of them [experts, rows, columns]."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch overloads it
        """Takes a step; `closure` is None. All ranks call it: sharded matrices are gathered."""
        for group in self.param_groups:
            options: MuonOptions = group["options"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self._momentum_of(parameter)
                ours, gradient = local_part(momentum), local_part(parameter.grad)
                ours.lerp_(gradient, 1 - options.momentum)
                update = momentum
                if options.nesterov:
                    update = _like(momentum, gradient.lerp(ours, options.momentum))
                moved = _of_whole_matrices(update, options)
                rows, columns = parameter.shape[-2:]
                rate = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                weight = local_part(parameter)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(moved, alpha=-rate)

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def _like(tensor: Tensor, local: Tensor) -> Tensor:
    """Returns a tensor that is distributed like another, from this rank's part."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _of_whole_matrices(update: Tensor, options: MuonOptions) -> Tensor:
    """Returns this rank's part of the orthogonalised matrices of an update.

    A matrix that several ranks share is gathered on each of them. Experts stay where they are: only
    their own rows and columns are brought together.
    """
    if not isinstance(update, DTensor):
        return orthogonalised(update, options)
    first = update.ndim - 2  # the dimension of a matrix's rows
    whole = [
        Replicate() if isinstance(p, Shard) and p.dim >= first else p for p in update.placements
    ]
    gathered = update.redistribute(placements=whole)
    moved = _like(gathered, orthogonalised(gathered.to_local(), options))
    assert isinstance(moved, DTensor)
    return moved.redistribute(placements=update.placements).to_local()


def orthogonalised(matrices: Tensor, options: MuonOptions) -> Tensor:
    """Returns the nearest matrices with orthogonal rows or columns, [*, rows, columns], roughly.

    Five iterations bring singular values between 0.7 and 1.2, which is near enough in practice.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    if matrices.is_cuda and not options.exact:
        x = x.bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(_SMALLEST_NORM)
    for _ in range(options.iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.mT if is_tall else x
    return found.to(matrices.dtype)


@OPTIMIZERS.register("muon", options=MuonOptions)
def muon(groups: Groups, settings: OptimSettings, options: MuonOptions) -> Optimizer:
    """Returns Muon for the matrices inside the layers, and AdamW for everything else."""
    ours: Groups = []
    others: Groups = []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim > 1]
        is_ours = matrices and group["role"] in (None, *ROLES)
        (ours if is_ours else others).append(group)
    parts: list[Optimizer] = []
    if ours:
        parts.append(Muon(ours, {"lr": settings.lr, "options": options}))
    if others:
        parts.append(
            LocalAdamW(others, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
        )
    return parts[0] if len(parts) == 1 else SeveralOptimizers(parts)
