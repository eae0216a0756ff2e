"""Each backend of the experts' arithmetic against a dense loop in float64, forward and backward."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import held_memory
from moetrain.kernels import (
    Assignments,
    HostCounts,
    expert_swiglu,
    group_assignments,
    slow_because,
    unavailable_because,
)

BACKENDS = ["cpu", "grouped_mm"]
NAMES = ("x", "gates", "gate", "up", "down")


def choices(case: str, *, top_k: int = 2) -> tuple[Tensor, int]:
    """Returns the experts that rows choose, [rows, top_k], and how many experts there are."""
    generator = torch.Generator().manual_seed(0)
    if case == "random":
        return torch.rand(37, 5, generator=generator).topk(top_k).indices, 5
    if case == "no rows":
        return torch.zeros(0, top_k, dtype=torch.int64), 3
    if case == "one row":
        return torch.tensor([[2, 0]]), 3
    if case == "all rows on one expert":
        return torch.full((40, 1), 2), 4
    if case == "one expert":
        return torch.zeros(9, 1, dtype=torch.int64), 1
    if case == "300 experts":
        return torch.rand(41, 300, generator=generator).topk(3).indices, 300
    raise AssertionError(case)


def problem(
    chosen: Tensor, experts: int, *, dim: int = 24, hidden: int = 40, ragged: bool = False
) -> tuple[Assignments, list[Tensor]]:
    """Returns assignments, and (x, gates, gate, up, down) with gradients."""
    torch.manual_seed(0)
    num_assignments = None
    if ragged:  # some choices are empty, as where a token met this rank with fewer experts
        chosen = chosen.masked_fill(torch.rand(chosen.shape) < 0.4, experts)
        num_assignments = int((chosen < experts).sum())
    assignments = group_assignments(chosen, num_groups=experts, num_assignments=num_assignments)
    tensors = [torch.randn(len(chosen), dim), torch.rand(assignments.row.numel())]
    tensors += [torch.randn(experts, hidden, dim) * dim**-0.5 for _ in range(3)]
    return assignments, [t.requires_grad_() for t in tensors]


def dense_loop(assignments: Assignments, x: Tensor, gates: Tensor, *weights: Tensor) -> Tensor:
    """The definition, an assignment at a time, in float64."""
    gate, up, down = weights
    expert = torch.repeat_interleave(torch.arange(len(assignments.counts)), assignments.counts)
    rows = x[assignments.row].unsqueeze(1)  # [assignments, 1, dim]
    hidden = F.silu(rows @ gate[expert].transpose(1, 2)) * (rows @ up[expert].transpose(1, 2))
    y = (hidden @ down[expert]).squeeze(1) * gates.unsqueeze(1)
    return torch.zeros_like(x).index_add(0, assignments.row, y)


def swiglu(
    assignments: Assignments, tensors: Sequence[Tensor], *, backend: str, recompute: bool = False
) -> Tensor:
    """`expert_swiglu` of the tensors in the order of `NAMES`."""
    x, gates, gate, up, down = tensors
    return expert_swiglu(
        x, gates, assignments, gate, up, down, backend=backend, recompute=recompute
    )


def check(
    assignments: Assignments, tensors: list[Tensor], *, backend: str, recompute: bool = False
) -> None:
    out = swiglu(assignments, tensors, backend=backend, recompute=recompute)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, tensors, grad)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = dense_loop(assignments, *exact)
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for name, mine, truth in zip(("out", *NAMES), (out, *ours), (expected, *theirs), strict=True):
        # Three products deep, each a sum of at most 64 terms of either sign in float32: its error
        # is at most eps * 64 of the terms' absolute sum, which is the size of the largest entry
        # times a small constant.
        scale = truth.abs().max().item() if truth.numel() else 0.0
        bound = 3 * 64 * torch.finfo(torch.float32).eps * max(scale, 1e-3)
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=bound, msg=name)


CASES = ["random", "no rows", "one row", "all rows on one expert", "one expert", "300 experts"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "megablocks"])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_dense_loop(case: str, backend: str, recompute: bool) -> None:
    if backend == "megablocks":
        if reason := unavailable_because("cpu"):
            pytest.skip(reason)
        if case == "300 experts":
            pytest.skip("test_megablocks.py has it: slow in Triton's interpreter")
    check(*problem(*choices(case)), backend=backend, recompute=recompute)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_have_any_number_of_assignments(backend: str) -> None:
    check(*problem(*choices("random", top_k=3), ragged=True), backend=backend)


def test_cpu_takes_any_shape() -> None:
    check(*problem(*choices("random"), dim=7, hidden=13), backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_transposed_weights(backend: str) -> None:
    assignments, tensors = problem(*choices("random"))
    stored = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in tensors[2:]]
    check(assignments, [*tensors[:2], *(t.transpose(1, 2) for t in stored)], backend=backend)


@pytest.mark.trap(17)
@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_stride_zero_gradients(backend: str) -> None:
    assignments, tensors = problem(*choices("random"))
    out = swiglu(assignments, tensors, backend=backend)
    ours = torch.autograd.grad(out.sum(), tensors)
    out = swiglu(assignments, tensors, backend=backend)
    theirs = torch.autograd.grad(out, tensors, torch.ones_like(out))
    for mine, dense in zip(ours, theirs, strict=True):
        assert torch.equal(mine, dense)


@pytest.mark.trap(7)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_no_memory_that_it_did_not_write(
    backend: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poisons every buffer that torch hands out unwritten: a nan that is left over shows."""
    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(place, name)

        def poisoned(*args: object, make: Any = original, **kwargs: object) -> Tensor:
            out: Tensor = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(place, name, poisoned)
    check(*problem(*choices("one row")), backend=backend, recompute=recompute)
    check(*problem(*choices("random")), backend=backend, recompute=recompute)


def test_recomputation_changes_no_bit() -> None:
    assignments, tensors = problem(*choices("random"))
    results = []
    for again in (False, True):
        out = swiglu(assignments, tensors, backend="cpu", recompute=again)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for kept, redone in zip(*results, strict=True):
        assert torch.equal(kept, redone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_keeps_nothing_as_wide_as_hidden(backend: str) -> None:
    assignments, tensors = problem(*choices("random"), dim=16, hidden=256)
    cpu = torch.device("cpu")
    held = {}
    for recompute in (False, True):
        kept: list[Tensor] = []

        def forward(recompute: bool = recompute, kept: list[Tensor] = kept) -> None:
            kept.append(swiglu(assignments, tensors, backend=backend, recompute=recompute))

        forward()  # what a first call allocates for good
        held[recompute] = held_memory(forward, cpu)
        del kept
    wide = assignments.row.numel() * 256 * 4
    assert held[False] >= 2 * wide, "the products of the gate and up matrices"
    assert held[True] < wide / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_close_as_its_rounding(backend: str) -> None:
    assignments, tensors = problem(*choices("random"))
    low = [t.detach().bfloat16().requires_grad_() for t in tensors]
    low[1] = tensors[1]
    out = swiglu(assignments, low, backend=backend)
    expected = dense_loop(assignments, *(t.detach().double() for t in low))
    # Five roundings to 8 bits on the way: g, u, h, y and their sum.
    bound = 5 * 2**-8 * expected.abs().max().item()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=bound)
    grads = torch.autograd.grad(out.sum(), low)
    assert grads[1].dtype == torch.float32, "the router's gradient isn't rounded to bfloat16"


def test_a_shape_that_a_backend_cannot_serve_is_refused_with_the_reason() -> None:
    assignments, tensors = problem(*choices("random"), dim=7)
    with pytest.raises(ValueError, match=r"whole 16 bytes; dim=7 .* multiples of 4"):
        swiglu(assignments, tensors, backend="grouped_mm")
    with pytest.raises(ValueError, match="choose one of auto, megablocks"):
        swiglu(assignments, tensors, backend="fastest")


@pytest.mark.parametrize("backend", [*BACKENDS, "megablocks", "auto"])
def test_dtypes_that_differ_or_have_no_products_are_refused(backend: str) -> None:
    assignments, tensors = problem(*choices("random"), dim=16, hidden=32)
    with pytest.raises(ValueError, match="must be of one dtype, not bfloat16, float32"):
        swiglu(assignments, [*tensors[:2], *(t.bfloat16() for t in tensors[2:])], backend=backend)
    if backend == "grouped_mm":
        double = [t.double() for t in tensors]
        with pytest.raises(ValueError, match=r"no products of torch\.float64"):
            swiglu(assignments, double, backend=backend)


def test_counts_that_lie_are_refused() -> None:
    assignments, tensors = problem(*choices("random"))
    counts = assignments.counts + 1
    assignments = assignments._replace(counts=counts, host=HostCounts(counts))
    with pytest.raises(ValueError, match="but there are 74 assignments"):
        swiglu(assignments, tensors, backend="cpu")


class GroupedProducts(TorchDispatchMode):
    """Remembers shapes and strides of the operands of grouped products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.operands: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_grouped_mm":
            self.operands.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def test_the_gradients_of_grouped_weights_have_the_layout_that_takes_empty_experts() -> None:
    """Hopper's kernel asserts on an empty expert in every other layout of this product."""
    assignments, tensors = problem(*choices("random"))
    x, gates, *weights = tensors
    with GroupedProducts() as products:
        y = expert_swiglu(x, gates, assignments, *weights, backend="grouped_mm")
        y.sum().backward()
    of_weights = [(a, b) for a, b in products.operands if b.ndim == 2]
    assert len(of_weights) == 3
    for a, b in of_weights:
        assert a.stride(0) == 1, "the left operand is transposed"
        assert b.stride(1) == 1, "the right one isn't"


@pytest.mark.parametrize(
    ("capability", "dtype", "slow"),
    [
        ((8, 0), torch.bfloat16, True),
        ((8, 9), torch.bfloat16, True),
        ((9, 0), torch.bfloat16, False),
        ((10, 0), torch.bfloat16, False),
        ((9, 0), torch.float32, True),
    ],
)
def test_where_torch_has_no_grouped_kernel_the_way_to_a_fast_one_is_said(
    capability: tuple[int, int], dtype: torch.dtype, slow: bool
) -> None:
    reason = slow_because(capability, dtype)
    assert (reason is not None) == slow
    if reason:
        assert f"compute capability {capability[0]}.{capability[1]}" in reason
        assert "make kernels" in reason
