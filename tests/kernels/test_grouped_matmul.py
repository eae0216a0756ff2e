"""Each backend of the grouped product against a dense loop, forward and backward."""

import pytest
import torch

from moetrain.kernels import grouped_matmul

# A product of reduction length n in float32 is off by about eps * sqrt(n); gradients of the
# weights reduce over the rows of a group, at most 64 here.
RTOL = torch.finfo(torch.float32).eps * 64
CASES = {
    "uneven": [5, 0, 17, 1],
    "no rows": [0, 0, 0],
    "one row": [0, 1, 0],
    "all rows on one expert": [0, 0, 40, 0],
    "one expert": [9],
    "300 experts": [i % 3 for i in range(300)],
}


@pytest.mark.parametrize("backend", ["cpu", "grouped_mm"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_dense_loop(case: str, transposed: bool, backend: str) -> None:
    counts = torch.tensor(CASES[case])
    torch.manual_seed(0)
    rows = torch.randn(int(counts.sum()), 24, requires_grad=True)
    stored = torch.randn(len(counts), *((32, 24) if transposed else (24, 32)), requires_grad=True)
    weights = stored.transpose(1, 2) if transposed else stored
    out = grouped_matmul(rows, weights, counts, backend=backend)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (rows, stored), grad)

    exact_rows, exact_stored = rows.double(), stored.double()
    exact_weights = exact_stored.transpose(1, 2) if transposed else exact_stored
    parts = [r @ w for r, w in zip(exact_rows.split(counts.tolist()), exact_weights, strict=True)]
    expected = torch.cat(parts)
    expected_grads = torch.autograd.grad(expected, (rows, stored), grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=RTOL, atol=RTOL * 10)
    for mine, theirs in zip(ours, expected_grads, strict=True):
        assert mine is not None, "an expert without tokens gets a zero gradient, not none"
        torch.testing.assert_close(mine, theirs.to(mine), rtol=RTOL, atol=RTOL * 10)


@pytest.mark.parametrize("backend", ["cpu", "grouped_mm"])
def test_takes_stride_zero_gradients(backend: str) -> None:
    rows = torch.randn(8, 16, requires_grad=True)
    weights = torch.randn(2, 16, 16, requires_grad=True)
    grouped_matmul(rows, weights, torch.tensor([3, 5]), backend=backend).sum().backward()
    expected = torch.cat([torch.ones(3, 16) @ weights[0].t(), torch.ones(5, 16) @ weights[1].t()])
    torch.testing.assert_close(rows.grad, expected)


@pytest.mark.parametrize("backend", ["cpu", "grouped_mm"])
def test_reads_no_memory_that_it_did_not_write(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poisons every buffer that torch hands out unwritten: a nan that is left over shows."""
    makers = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    for place, name in makers:
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, f=original, **k: f(*a, **k).fill_(float("nan")))
    rows = torch.randn(4, 16, requires_grad=True)
    weights = torch.randn(3, 16, 16, requires_grad=True)
    out = grouped_matmul(rows, weights, torch.tensor([4, 0, 0]), backend=backend)
    out.backward(torch.randn(4, 16))
    assert out.isfinite().all()
    assert weights.grad.isfinite().all()


def test_grouped_mm_names_a_shape_that_it_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"inner=3.*backend='cpu'"):
        grouped_matmul(
            torch.randn(2, 3), torch.randn(1, 3, 16), torch.tensor([2]), backend="grouped_mm"
        )


def test_counts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="counts add up to 3, but there are 2 rows"):
        grouped_matmul(torch.randn(2, 4), torch.randn(1, 4, 4), torch.tensor([3]), backend="cpu")
