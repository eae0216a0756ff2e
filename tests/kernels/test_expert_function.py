"""Experts of another function than SwiGLU: by a plain loop, in float64, values and gradients."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels import ExpertFunction, compute_experts, expert_function, group_assignments
from moetrain.settings import ExpertsSettings

TOKENS, DIM, HIDDEN, EXPERTS, TOP_K = 24, 16, 32, 4, 2


class GeGLU(ExpertFunction):
    """gelu(gate) * up."""

    def __call__(self, up: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return F.gelu(gate) * up


class SquaredReLU(ExpertFunction):
    """relu(up) squared, without a gate."""

    gated = False

    def __call__(self, up: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is None
        return F.relu(up).square()


class PlainSwiGLU(ExpertFunction):
    """What is built in, by way of another function."""

    def __call__(self, up: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return F.silu(gate) * up


class Inputs(NamedTuple):
    """Rows, gates in the order of tokens, and weights [experts, hidden, dim]."""

    x: Tensor
    gates: Tensor
    up: Tensor
    down: Tensor
    gate: Tensor | None

    def gradients(self) -> list[Tensor]:
        """Returns the gradients of all that there is."""
        return [t.grad for t in self if t is not None and t.grad is not None]


def inputs(dtype: torch.dtype, *, gated: bool = True) -> Inputs:
    torch.manual_seed(0)
    weights = [torch.randn(EXPERTS, HIDDEN, DIM) * DIM**-0.5 for _ in range(3)]
    made = [torch.randn(TOKENS, DIM), torch.rand(TOKENS, TOP_K), *weights]
    x, gates, up, down, gate = (tensor.to(dtype).requires_grad_() for tensor in made)
    return Inputs(x, gates, up, down, gate if gated else None)


def chosen() -> Tensor:
    """Returns the experts of each token, [tokens, top_k]; expert 3 gets none."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(TOP_K).indices


def expected(function: ExpertFunction, given: Inputs) -> Tensor:
    """Returns the sum over each token's experts, one after the other."""
    rows = []
    for token, experts in enumerate(chosen()):
        parts = []
        for slot, expert in enumerate(experts):
            row = given.x[token]
            g = None if given.gate is None else row @ given.gate[expert].t()
            y = function(row @ given.up[expert].t(), g) @ given.down[expert]
            parts.append(given.gates[token, slot] * y)
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def computed(
    function: ExpertFunction, given: Inputs, *, backend: str = "auto", recompute: bool = False
) -> Tensor:
    assignments = group_assignments(chosen(), num_groups=EXPERTS)
    return compute_experts(
        given.x,
        given.gates.flatten()[assignments.slot],
        assignments,
        given.gate,
        given.up,
        given.down,
        function=function,
        backend=backend,
        recompute=recompute,
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("auto", torch.float64), ("cpu", torch.float64), ("grouped_mm", torch.float32)],
)
@pytest.mark.parametrize("made", [GeGLU, SquaredReLU, PlainSwiGLU])
def test_values_and_gradients_are_those_of_a_loop_over_tokens(
    made: Callable[[], ExpertFunction], backend: str, dtype: torch.dtype, recompute: bool
) -> None:
    function = made()
    ours, theirs = (inputs(dtype, gated=function.gated) for _ in range(2))
    y = computed(function, ours, backend=backend, recompute=recompute)
    right = expected(function, theirs)
    # Products over dim and hidden, a sum over top_k: the error grows with the root of the length.
    close = {"rtol": 0.0, "atol": 64 * torch.finfo(dtype).eps * (DIM + HIDDEN) ** 0.5}
    torch.testing.assert_close(y, right, **close)
    y.square().sum().backward()
    right.square().sum().backward()
    assert len(ours.gradients()) == (5 if function.gated else 4)
    for mine, other in zip(ours.gradients(), theirs.gradients(), strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(mine / scale, other / scale, **close)


def test_the_built_in_function_has_kernels_of_its_own_that_agree() -> None:
    settings = ExpertsSettings()
    built_in = expert_function(settings)
    ours, theirs = inputs(torch.float64), inputs(torch.float64)
    y, other = computed(built_in, ours), computed(PlainSwiGLU(), theirs)
    assert type(y.grad_fn) is not type(other.grad_fn), "another way"
    torch.testing.assert_close(y, other, rtol=1e-12, atol=1e-12)


def test_backends_that_cannot_serve_a_function_say_so() -> None:
    with pytest.raises(ValueError, match=r"megablocks' computes swiglu alone: use backend='auto'"):
        computed(GeGLU(), inputs(torch.float32), backend="megablocks")
    with pytest.raises(ValueError, match=r"no products of torch\.float64"):
        computed(GeGLU(), inputs(torch.float64), backend="grouped_mm")
