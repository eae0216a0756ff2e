"""The backends on a CUDA device: against float64 on the CPU, and how long they take."""

import functools
from typing import Any

import pytest
import torch

from moetrain.kernels import (
    Assignments,
    expert_swiglu,
    group_assignments,
    refuses,
    sum_assignments,
    unavailable_because,
)
from moetrain.kernels.attention import (
    attention_choices,
    attention_is_wrong,
    fused_attention,
    has_flash3,
)
from moetrain.kernels.autotune import ExpertShape, seconds_of_backends
from tests.kernels.test_expert_swiglu import choices, dense_loop, problem, swiglu

pytestmark = pytest.mark.gpu

CASES = ["random", "no rows", "one row", "all rows on one expert", "300 experts"]


def on_gpu(assignments: Assignments) -> Assignments:
    tensors: dict[str, Any] = {
        k: v.cuda() for k, v in assignments._asdict().items() if isinstance(v, torch.Tensor)
    }
    return assignments._replace(**tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["megablocks", "grouped_mm", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case: str, backend: str, recompute: bool, dtype: torch.dtype) -> None:
    if backend == "megablocks" and (reason := unavailable_because("cuda")):
        pytest.skip(reason)
    assignments, tensors = problem(*choices(case), dim=128, hidden=256)
    low = [t.detach().to(dtype) for t in tensors]
    low[1] = tensors[1].detach()  # gates are float32
    exact = [t.double().requires_grad_() for t in low]
    expected = dense_loop(assignments, *exact)
    grad = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, exact, grad)

    here = on_gpu(assignments)
    mine = [t.cuda().requires_grad_() for t in low]
    out = swiglu(here, mine, backend=backend, recompute=recompute)
    ours = torch.autograd.grad(out, mine, grad.to("cuda", dtype))
    # At most six roundings on the way to a gradient; float32 products may be TF32, of 10 bits.
    eps = 6 * (2**-8 if dtype == torch.bfloat16 else 2**-10)
    for got, truth in zip((out, *ours), (expected, *theirs), strict=True):
        error = (got.detach().cpu().double() - truth).norm()
        assert error <= eps * truth.norm() + 1e-30


def test_backends_are_timed_on_the_device() -> None:
    if reason := unavailable_because("cuda"):
        pytest.skip(reason)
    shape = ExpertShape(
        rows=1024, choices=2, exchanged=True, dim=128, hidden=256, experts=4,
        dtype=torch.bfloat16, device=torch.device("cuda"),
    )  # fmt: skip
    names = ("megablocks", "grouped_mm")
    assert [refuses(name, *shape.outline()) for name in names] == [None, None]
    candidates = {name: functools.partial(expert_swiglu, backend=name) for name in names}
    seconds = seconds_of_backends(shape, candidates)
    assert set(seconds) == set(names)
    assert all(taken > 0 for taken in seconds.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_attention_kernels_answer_rightly(dtype: torch.dtype, kv_heads: int) -> None:
    device = torch.device("cuda")
    for name in attention_choices(
        torch.cuda.get_device_capability(), dtype, by_document=False, has_flash3=has_flash3()
    ):
        assert (
            attention_is_wrong(
                name, heads=8, kv_heads=kv_heads, head_dim=64, device=device, dtype=dtype
            )
            is None
        ), name


def test_no_kernel_holds_the_scores_of_a_sequence() -> None:
    q = torch.randn(1, 8, 32768, 64, device="cuda", requires_grad=True)
    k, v = torch.randn(2, 1, 2, 32768, 64, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_attention(q, k, v).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * 32768**2  # all scores: 4 times that


def test_more_rows_than_a_batch_of_products_may_have_are_summed_exactly() -> None:
    rows = 70_000
    chosen = torch.arange(2 * rows, device="cuda").view(rows, 2) % 4
    assignments = group_assignments(chosen, num_groups=4)
    values = torch.randn(2 * rows, 8, device="cuda", requires_grad=True)
    weights = torch.rand(2 * rows, device="cuda", requires_grad=True)
    out = sum_assignments(values, assignments, weights)
    exact = torch.zeros(rows, 8, device="cuda", dtype=torch.float64)
    exact.index_add_(0, assignments.row, (values * weights[:, None]).double())
    torch.testing.assert_close(out.double(), exact)
    (grad,) = torch.autograd.grad(out.sum(), weights)
    torch.testing.assert_close(grad, values.sum(1))
