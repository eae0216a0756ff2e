"""MegaBlocks' kernels against a dense float64 loop, forward and backward.

The kernels are the real ones: compiled on a GPU, and on a CPU run by Triton's interpreter
(conftest.py asks for it before anything imports triton).
"""

import importlib.util
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels import Assignments, HostCounts, group_assignments, megablocks_ops_in_torch
from moetrain.kernels.megablocks_ops import (
    PACKAGES,
    _libraries,
    megablocks_swiglu,
    unavailable_because,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A float32 product of reduction length n is off by about eps * sqrt(n), and TF32, which a GPU
# takes for float32, by 2**-10 whatever the length. The longest chain of products, from the inputs
# through the forward and back to a gradient, is five.
REDUCTION = 256
RTOL = 5 * (2**-10 if DEVICE == "cuda" else torch.finfo(torch.float32).eps * math.sqrt(REDUCTION))

# Each row's experts; how many experts there are; dim; hidden.
CASES: dict[str, tuple[list[list[int]], int, int, int]] = {
    "top-2": ([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2]], 3, 128, 128),
    "no rows": ([], 3, 128, 128),
    "rows without assignments": ([[], []], 3, 128, 128),
    "one assignment": ([[1]], 2, 128, 128),
    "all rows on one expert": ([[1]] * 5, 3, 128, 128),
    "two block rows and two block columns": ([[0]] + [[1]] * 129, 2, 128, 256),
    "none to three assignments a row": ([[0, 1], [], [2], [0, 1, 2], []], 3, 128, 128),
    "no multiples of 128": ([[0, 1], [1, 0], [0, 1]], 2, 40, 72),
    "no multiples of 128, none to two assignments": ([[0, 1], [], [1]], 2, 24, 8),
}


@pytest.fixture(autouse=True)
def _kernels_are_here() -> None:
    """Skips where a package is missing; where all are here, the kernels have to run."""
    missing = [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: make kernels")
    assert unavailable_because(DEVICE) is None


def assignments_of(chosen: list[list[int]], *, num_experts: int) -> tuple[Assignments, Tensor]:
    """Returns the assignments of rows that chose these experts, and each assignment's expert."""
    slots = max((len(experts) for experts in chosen), default=1) or 1
    choices = torch.full((len(chosen), slots), num_experts)
    for row, experts in enumerate(chosen):
        choices[row, : len(experts)] = torch.tensor(experts)
    num_assignments = sum(map(len, chosen))
    assignments = group_assignments(
        choices.to(DEVICE),
        num_groups=num_experts,
        num_assignments=None if num_assignments == choices.numel() else num_assignments,
    )
    return assignments, torch.arange(num_experts).repeat_interleave(assignments.counts.cpu())


def inputs(
    num_rows: int, num_assignments: int, num_experts: int, dim: int, hidden: int
) -> list[Tensor]:
    """Returns x, gates, gate, up and down, scaled so that all results are of order one."""
    torch.manual_seed(0)
    weights = [torch.randn(num_experts, hidden, dim) for _ in range(3)]
    scales = [dim, dim, hidden]
    tensors = [torch.randn(num_rows, dim), torch.rand(num_assignments) + 0.5]
    tensors += [weight / math.sqrt(n) for weight, n in zip(weights, scales, strict=True)]
    return [tensor.to(DEVICE).requires_grad_() for tensor in tensors]


def dense(
    tensors: list[Tensor], assignments: Assignments, experts: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Returns the same output by a loop over assignments in float64, and the exact leaves."""
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    x, gates, gate, up, down = exact
    rows = [torch.zeros(x.shape[1], dtype=torch.float64) + 0 * row.detach() for row in x]
    for index, (row, expert) in enumerate(
        zip(assignments.row.tolist(), experts.tolist(), strict=True)
    ):
        inner = F.silu(gate[expert] @ x[row]) * (up[expert] @ x[row])
        rows[row] = rows[row] + gates[index] * (inner @ down[expert])
    return (torch.stack(rows) if rows else x.detach().clone()), exact


def assert_equal(ours: Tensor | None, theirs: Tensor, *, rtol: float = RTOL) -> None:
    """Asserts that the relative error in norm is within the tolerance, and zeros are exact."""
    assert ours is not None
    error = torch.linalg.vector_norm(ours.detach().cpu().double() - theirs)
    assert error <= rtol * torch.linalg.vector_norm(theirs), f"error {error}"


@pytest.mark.parametrize("case", CASES)
def test_equals_a_dense_loop_forward_and_backward(case: str) -> None:
    chosen, num_experts, dim, hidden = CASES[case]
    assignments, experts = assignments_of(chosen, num_experts=num_experts)
    tensors = inputs(len(chosen), len(experts), num_experts, dim, hidden)
    x, gates, *weights = tensors
    out = megablocks_swiglu(x, gates, assignments, *weights)
    expected, exact = dense(tensors, assignments, experts)
    assert_equal(out, expected)
    grad = torch.randn(out.shape)
    ours = torch.autograd.grad(out, tensors, grad.to(DEVICE))
    if len(experts):
        theirs = torch.autograd.grad(expected, exact, grad.double())
    else:
        theirs = tuple(torch.zeros_like(tensor) for tensor in exact)
    for mine, reference in zip(ours, theirs, strict=True):
        assert_equal(mine, reference)


@pytest.mark.parametrize("case", ["one assignment", "none to three assignments a row"])
def test_takes_stride_zero_gradients(case: str) -> None:
    chosen, num_experts, dim, hidden = CASES[case]
    assignments, experts = assignments_of(chosen, num_experts=num_experts)
    tensors = inputs(len(chosen), len(experts), num_experts, dim, hidden)
    x, gates, *weights = tensors
    megablocks_swiglu(x, gates, assignments, *weights).sum().backward()
    expected, exact = dense(tensors, assignments, experts)
    expected.sum().backward()
    for mine, reference in zip(tensors, exact, strict=True):
        assert reference.grad is not None
        assert_equal(mine.grad, reference.grad)


def test_takes_views_of_other_tensors() -> None:
    """A transposed weight, a part of a wider one and a part of wider rows: bits don't change."""
    chosen, num_experts, dim, hidden = [[0], [1]], 2, 128, 128
    assignments, experts = assignments_of(chosen, num_experts=num_experts)
    dense_ones = inputs(len(chosen), len(experts), num_experts, dim, hidden)
    views = [tensor.detach() for tensor in dense_ones]
    views[0] = F.pad(views[0], (0, 8))[:, :dim]
    views[2] = views[2].transpose(1, 2).contiguous().transpose(1, 2)
    views[3] = F.pad(views[3], (0, 128))[:, :, :dim]
    views = [view.requires_grad_() for view in views]
    assert not any(views[i].is_contiguous() for i in (0, 2, 3))
    results = []
    for x, gates, *weights in (dense_ones, views):
        out = megablocks_swiglu(x, gates, assignments, *weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, gates, *weights])])
    for plain, of_views in zip(*results, strict=True):
        assert torch.equal(plain, of_views)


@pytest.mark.trap(16)
def test_block_indices_over_255_reach_the_right_expert() -> None:
    """Experts 256 and up, of which 16-bit products of block indices would lose the place."""
    chosen = [[299], [0], [256], [299]]
    assignments, experts = assignments_of(chosen, num_experts=300)
    tensors = inputs(4, 4, 300, 128, 128)
    x, gates, *weights = tensors
    out = megablocks_swiglu(x, gates, assignments, *(weight.detach() for weight in weights))
    expected, exact = dense(tensors, assignments, experts)
    assert_equal(out, expected)
    for mine, reference in zip(
        torch.autograd.grad(out.sum(), [x, gates]),
        torch.autograd.grad(expected.sum(), exact[:2]),
        strict=True,
    ):
        assert_equal(mine, reference)


@pytest.mark.trap(16)
def test_block_indices_over_32767_reach_the_right_expert() -> None:
    """32,770 block columns: past what an int16 can count. In float16, and one weight for three."""
    num_experts, last = 32_770, 32_769
    half: dict[str, Any] = {"dtype": torch.float16, "device": DEVICE}
    weight = torch.zeros(num_experts, 128, 128, **half)  # 1 GiB
    weight[[0, last]] = torch.randn(2, 128, 128, **half) / math.sqrt(128)
    assignments, experts = assignments_of([[last], [0]], num_experts=num_experts)
    x = torch.randn(2, 128, **half, requires_grad=True)
    gates = torch.ones(2, device=DEVICE)
    out = megablocks_swiglu(x, gates, assignments, weight, weight, weight)
    expected, exact = dense([x, gates, *[weight[[0, last]]] * 3], assignments, experts // last)
    rtol = 5 * torch.finfo(torch.float16).eps  # one rounding for each product of the chain
    assert_equal(out, expected, rtol=rtol)
    (grad,) = torch.autograd.grad(out.sum(), [x])
    assert_equal(grad, torch.autograd.grad(expected.sum(), exact[:1])[0], rtol=rtol)


@pytest.mark.trap(16)
@pytest.mark.slow
def test_300_experts_get_their_own_gradients() -> None:
    chosen = [[row * 7 % 300] for row in range(4)] + [[299], [257]]
    assignments, experts = assignments_of(chosen, num_experts=300)
    tensors = inputs(len(chosen), len(experts), 300, 128, 128)
    x, gates, *weights = tensors
    out = megablocks_swiglu(x, gates, assignments, *weights)
    expected, exact = dense(tensors, assignments, experts)
    assert_equal(out, expected)
    grad = torch.randn(out.shape)
    ours = torch.autograd.grad(out, tensors, grad.to(DEVICE))
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for mine, reference in zip(ours, theirs, strict=True):
        assert_equal(mine, reference)


def test_megablocks_own_layer_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dMoE` with the same weights, on the same routing, with its own sort and topology."""
    import megablocks
    import triton

    num_experts, dim, hidden = 3, 128, 128
    chosen = [[0, 1], [2, 0], [2, 1]]
    with monkeypatch.context() as patch:
        # Its Arguments compare version strings and refuse every triton from 3.2 on (and would take
        # 3.10); the kernels themselves are what this module runs.
        patch.setattr(triton, "__version__", "3.1.0")
        layer = megablocks.dMoE(
            megablocks.Arguments(
                hidden_size=dim,
                ffn_hidden_size=hidden,
                moe_num_experts=num_experts,
                moe_top_k=2,
                mlp_type="glu",
                mlp_impl="sparse",
                activation_fn=F.silu,
                bias=False,
                return_bias=False,
                moe_loss_weight=0.0,
                fp16=False,
                device=DEVICE,
            )
        )
    assignments, experts = assignments_of(chosen, num_experts=num_experts)
    x, gates, *weights = inputs(len(chosen), len(experts), num_experts, dim, hidden)
    mlp = layer.experts.mlp
    theirs = [mlp.w1, mlp.v1, mlp.w2]
    with torch.no_grad():
        for weight, ours in zip(theirs, weights, strict=True):
            weight.copy_(ours.flatten(0, 1))
    by_token = gates.detach()[assignments.by_row].view(-1, 2).requires_grad_()
    their_x = x.detach().clone().requires_grad_()
    # Its gates are in the order of tokens, ours in that of experts within a token.
    top_experts = experts[assignments.by_row.cpu()].view(-1, 2).to(DEVICE)
    reference = layer.experts(their_x[:, None], None, by_token, top_experts)[:, 0]
    grad = torch.randn(len(chosen), dim, device=DEVICE)
    expected = torch.autograd.grad(reference, [their_x, by_token, *theirs], grad)

    out = megablocks_swiglu(x, gates, assignments, *weights)
    got = torch.autograd.grad(out, [x, gates, *weights], grad)
    assert_equal(out, reference.detach().cpu().double())
    got = (got[0], got[1][assignments.by_row].view(-1, 2), *(g.flatten(0, 1) for g in got[2:]))
    for mine, other in zip(got, expected, strict=True):
        assert_equal(mine, other.cpu().double())


def test_what_the_kernels_cannot_multiply_is_refused_with_the_reason() -> None:
    assignments, _ = assignments_of([[0]], num_experts=1)
    x, gates, *weights = inputs(1, 1, 1, 128, 128)
    with pytest.raises(ValueError, match=r"one dtype among .*not float32, float64.*backend='cpu'"):
        megablocks_swiglu(x.double(), gates, assignments, *weights)
    if DEVICE == "cpu":
        halves = [weight.bfloat16() for weight in weights]
        with pytest.raises(ValueError, match="interpreter computes wrong products of bfloat16"):
            megablocks_swiglu(x.bfloat16(), gates, assignments, *halves)


@pytest.mark.parametrize(
    ("rows", "experts", "hidden", "dim", "reason"),
    [
        (2**16, 1, 128, 2**15, r"65663 padded rows \* dim 32768"),
        (2**16, 1, 2**15, 128, r"65663 padded rows \* hidden 32768"),
        (1, 2**10, 2**11, 2**10, r"1024 experts \* hidden 2048 \* dim 1024 = 2147483648"),
    ],
)
def test_sizes_past_the_kernels_offsets_are_refused(
    rows: int, experts: int, hidden: int, dim: int, reason: str
) -> None:
    one = torch.zeros(1, device=DEVICE)  # expanded: the shapes take no memory
    nowhere = torch.zeros(1, dtype=torch.int64, device=DEVICE).expand(rows)
    counts = nowhere[:1].expand(experts)
    assignments = Assignments(nowhere, counts, nowhere, nowhere, 1, nowhere, HostCounts(counts))
    weight = one.expand(experts, hidden, dim)
    with pytest.raises(ValueError, match=reason + r".*backend='grouped_mm'"):
        megablocks_swiglu(
            one.expand(rows, dim), one.expand(rows), assignments, weight, weight, weight
        )


def test_the_stand_in_is_registered_only_where_the_compiled_module_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = ModuleType("megablocks_ops")
    monkeypatch.setitem(sys.modules, "megablocks_ops", compiled)
    _libraries.__wrapped__()
    assert sys.modules["megablocks_ops"] is compiled
    monkeypatch.setitem(sys.modules, "megablocks_ops", None)  # importing it fails
    _libraries.__wrapped__()
    assert sys.modules["megablocks_ops"] is megablocks_ops_in_torch


def test_counts_that_the_host_has_are_not_asked_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MegaBlocks' own gather asks for the number of padded rows, forward and backward."""

    def asks(*_: Any) -> Any:
        raise AssertionError("the number of padded rows is asked of the device")

    monkeypatch.setattr(_libraries().kernels, "padded_gather", asks)
    assignments, _ = assignments_of([[0, 2], [2, 0], [0]], num_experts=3)
    assignments = assignments._replace(host=HostCounts([3, 0, 2]))
    tensors = inputs(3, 5, 3, 128, 128)
    out = megablocks_swiglu(tensors[0], tensors[1], assignments, *tensors[2:])
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), tensors))
