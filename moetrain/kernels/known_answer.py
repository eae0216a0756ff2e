"""Whether a backend computes what it should on a device: a small layer, against float64.

Kernels for grouped products have had bugs with experts that get nothing (pytorch#172439, #193633):
in this layer there are some before, between and behind those with tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels.assignments import group_assignments
from moetrain.kernels.expert_swiglu import expert_swiglu

DIM = 128  # of the layer, and its hidden size: one block of MegaBlocks' kernels
EXPERTS, CHOSEN, ROWS = 6, (1, 3), 4


class Answer(NamedTuple):
    """How a backend's output and gradients compare with the right ones."""

    error: float | None
    """The largest relative error, in norm; None if the backend doesn't run."""
    tolerance: float
    reason: str | None
    """Why the backend can't be used; None where it can."""


def answer_of(backend: str, *, device: torch.device | str, dtype: torch.dtype) -> Answer:
    """Runs a backend forward and backward on a device, and compares."""
    # Each of the five products from an input to a gradient sums in float32 and rounds to dtype.
    eps = torch.finfo(torch.float32).eps
    tolerance = 5 * (torch.finfo(dtype).eps + eps * math.sqrt(DIM))
    try:
        error = _largest_error(backend, device=device, dtype=dtype)
    except Exception as raised:  # a kernel may raise anything
        return Answer(None, tolerance, f"{type(raised).__name__}: {raised}")
    return Answer(error, tolerance, wrong_because(error, tolerance))


def largest_error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Returns the largest relative error, in norm, of some results."""
    pairs = [(a.detach().cpu().double(), b.detach()) for a, b in zip(ours, exact, strict=True)]
    return float(
        torch.stack([torch.dist(a, b) / torch.linalg.vector_norm(b) for a, b in pairs]).max()
    )


def wrong_because(error: float, tolerance: float) -> str | None:
    """Returns how results are wrong, None if they aren't."""
    if error <= tolerance:  # False for nan
        return None
    return f"its results are wrong: off by {error:.1e}, allowed are {tolerance:.1e}"


def _largest_error(backend: str, *, device: torch.device | str, dtype: torch.dtype) -> float:
    choices = torch.tensor([CHOSEN] * ROWS, device=device)
    assignments = group_assignments(choices, num_groups=EXPERTS)
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, ROWS, DIM, generator=generator).to(dtype)
    gates = torch.rand(ROWS * len(CHOSEN), generator=generator)
    weights = torch.randn(3, EXPERTS, DIM, DIM, generator=generator) / math.sqrt(DIM)
    weights = weights.to(dtype)

    exact = [tensor.double().requires_grad_() for tensor in (x, gates, *weights)]
    with torch.enable_grad():
        expected = [_dense(*exact)]
        expected += torch.autograd.grad(expected[0], exact, grad.double())
        inputs = [tensor.to(device).requires_grad_() for tensor in (x, gates, *weights)]
        rows, row_gates, gate, up, down = inputs
        out = expert_swiglu(rows, row_gates, assignments, gate, up, down, backend=backend)
        ours = [out, *torch.autograd.grad(out, inputs, grad.to(device))]
    return largest_error(ours, expected)


def _dense(x: Tensor, gates: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Returns the layer's output by plain products: all rows at each chosen expert."""
    parts = [
        ((F.silu(x @ gate[e].t()) * (x @ up[e].t())) @ down[e]) * weights[:, None]
        for e, weights in zip(CHOSEN, gates.chunk(len(CHOSEN)), strict=True)
    ]
    return torch.stack(parts).sum(0)
