"""What an expert computes between its matrices, and experts with any such function.

SwiGLU has its own kernels (`expert_swiglu`). Any other function uses torch's products, grouped
where torch has them, and autograd.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.kernels.assignments import Assignments, gather_rows, sum_assignments
from moetrain.kernels.expert_swiglu import (
    expert_swiglu,
    grouped_mm_refuses,
    without_assignments,
)
from moetrain.registries import EXPERT_FUNCTIONS
from moetrain.settings.model import ExpertsSettings


class ExpertFunction(ABC):
    """Element by element: `down(f(up(x), gate(x)))`, or `down(f(up(x), None))` without a gate.

    It has no parameters, and sees one token's values at a time, in the model's compute dtype: so
    it is the same in every layout.
    """

    gated = True
    """Whether there is a gate matrix beside the up matrix."""

    def __init__(self, options: Any = None) -> None:
        self.options = options
        """Its options: an object of the dataclass it is registered with."""

    @abstractmethod
    def __call__(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """Returns the input of the down matrix; all [..., hidden]."""


@EXPERT_FUNCTIONS.register("swiglu")
class SwiGLU(ExpertFunction):
    """silu(gate) * up (arXiv 2002.05202)."""

    def __call__(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """Returns silu(gate) * up."""
        assert gate is not None
        return F.silu(gate) * up


def expert_function(settings: ExpertsSettings) -> ExpertFunction:
    """Returns the function that the settings name, with its options."""
    name, options = settings.function, settings.options
    made: Callable[[Any], ExpertFunction] = EXPERT_FUNCTIONS.get(name).made
    return made(EXPERT_FUNCTIONS.typed_options(name, options))


def compute_experts(
    x: Tensor,
    gates: Tensor,
    assignments: Assignments,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    *,
    function: ExpertFunction,
    backend: str = "auto",
    preferred: str | None = None,
    recompute: bool = False,
) -> Tensor:
    """Returns for each row [rows, dim] the sum over its assignments c, of expert e, of

    `gates[c] * f(row @ up[e].T, row @ gate[e].T) @ down[e]`.

    Weights are [experts, hidden, dim], `gates` [assignments] in the order of `assignments.row`;
    `gate` is None for a function without one. `preferred` is SwiGLU's with `auto`. Raises
    ValueError where a backend can't serve the function.
    """
    if isinstance(function, SwiGLU):
        assert gate is not None
        return expert_swiglu(
            *(x, gates, assignments, gate, up, down),
            backend=backend,
            preferred=preferred,
            recompute=recompute,
        )
    if not assignments.row.numel():
        return without_assignments(x, gates, assignments, gate, up, down)
    if backend == "megablocks":
        raise ValueError(
            "backend='megablocks' computes swiglu alone: use backend='auto' for another function"
        )
    if backend == "auto":
        fits = x.device.type != "cpu" and grouped_mm_refuses(x, up) is None
        backend = "grouped_mm" if fits else "cpu"
    if backend == "grouped_mm" and (reason := grouped_mm_refuses(x, up)):
        raise ValueError(reason)
    products = partial(_grouped if backend == "grouped_mm" else _one_by_one, function=function)
    if recompute and torch.is_grad_enabled():
        y: Tensor = checkpoint(
            products, x, assignments, gate, up, down, use_reentrant=False, preserve_rng_state=False
        )
    else:
        y = products(x, assignments, gate, up, down)
    return sum_assignments(y, assignments, gates)


def _grouped(
    x: Tensor,
    assignments: Assignments,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    *,
    function: ExpertFunction,
) -> Tensor:
    ends = assignments.counts.cumsum(0, dtype=torch.int32)
    rows = gather_rows(x, assignments)
    u = F.grouped_mm(rows, up.transpose(1, 2), offs=ends)
    g = None if gate is None else F.grouped_mm(rows, gate.transpose(1, 2), offs=ends)
    return F.grouped_mm(function(u, g), down, offs=ends)


def _one_by_one(
    x: Tensor,
    assignments: Assignments,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    *,
    function: ExpertFunction,
) -> Tensor:
    # `unbind` gives the stack one gradient; `weight[e]` would give it one for each expert.
    ups, downs = up.unbind(), down.unbind()
    gates = (None,) * len(ups) if gate is None else gate.unbind()
    parts = []
    for rows, g, u, d in zip(
        gather_rows(x, assignments).split(assignments.host.read()),
        gates,
        ups,
        downs,
        strict=True,
    ):
        parts.append(function(rows @ u.t(), None if g is None else rows @ g.t()) @ d)
    return torch.cat(parts)
