"""Copies of rows grouped by expert, and the sums back."""

import pytest
import torch

from moetrain.kernels import Copies, gather_copies, group_copies, sum_copies


def test_grouping_is_stable_and_counts_every_expert() -> None:
    copies = group_copies(torch.tensor([[2, 0], [2, 1], [0, 2]]), num_groups=4)
    assert copies.row.tolist() == [0, 2, 1, 0, 1, 2]
    assert copies.slot.tolist() == [1, 4, 3, 0, 2, 5]
    assert copies.counts.tolist() == [2, 1, 3, 0]
    assert copies.offsets.tolist() == [0, 2, 4, 6]
    assert copies.row[copies.by_row].tolist() == [0, 0, 1, 1, 2, 2]
    assert copies.per_row == 2


def test_empty_slots_are_no_copies() -> None:
    choices = torch.tensor([[4, 4], [1, 4], [4, 4], [0, 3]])
    copies = group_copies(choices, num_groups=4, num_copies=3)
    assert copies.row.tolist() == [3, 1, 3]
    assert copies.counts.tolist() == [1, 1, 0, 1]
    assert copies.offsets.tolist() == [0, 0, 1, 1, 3]
    assert copies.row[copies.by_row].tolist() == [1, 3, 3]
    assert copies.per_row is None


def ragged(rows: int, slots: int) -> Copies:
    choices = torch.stack([torch.randperm(6)[:slots] for _ in range(rows)])
    choices[torch.rand(rows, slots) < 0.5] = 6
    return group_copies(choices, num_groups=6, num_copies=int((choices < 6).sum()))


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_gather_and_sum_have_the_gradients_of_plain_indexing(even: bool, weighted: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    choices = torch.stack([torch.randperm(6)[:3] for _ in range(7)])
    copies = group_copies(choices, num_groups=6) if even else ragged(7, 3)
    num_copies = copies.row.numel()
    scale = torch.randn(num_copies, 1, dtype=torch.float64)
    weights = torch.rand(num_copies, dtype=torch.float64, requires_grad=True)

    values = gather_copies(x, copies) * scale
    out = sum_copies(values, copies, weights if weighted else None)
    terms = x[copies.row] * scale * (weights[:, None] if weighted else 1.0)
    expected = torch.zeros_like(x).index_add(0, copies.row, terms)
    torch.testing.assert_close(out, expected)
    inputs = (x, weights) if weighted else (x,)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


def test_no_copies_sum_to_zero() -> None:
    copies = group_copies(torch.full((3, 2), 4), num_groups=4, num_copies=0)
    assert torch.equal(sum_copies(torch.zeros(0, 5), copies), torch.zeros(3, 5))
