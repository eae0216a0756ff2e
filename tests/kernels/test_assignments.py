"""Assignments of rows grouped by expert, and the sums back."""

import pytest
import torch

from moetrain.kernels import Assignments, gather_rows, group_assignments, sum_assignments


def test_grouping_is_stable_and_counts_every_expert() -> None:
    assignments = group_assignments(torch.tensor([[2, 0], [2, 1], [0, 2]]), num_groups=4)
    assert assignments.row.tolist() == [0, 2, 1, 0, 1, 2]
    assert assignments.slot.tolist() == [1, 4, 3, 0, 2, 5]
    assert assignments.counts.tolist() == [2, 1, 3, 0]
    assert assignments.offsets.tolist() == [0, 2, 4, 6]
    assert assignments.row[assignments.by_row].tolist() == [0, 0, 1, 1, 2, 2]
    assert assignments.per_row == 2


def test_empty_slots_are_no_assignments() -> None:
    choices = torch.tensor([[4, 4], [1, 4], [4, 4], [0, 3]])
    assignments = group_assignments(choices, num_groups=4, num_assignments=3)
    assert assignments.row.tolist() == [3, 1, 3]
    assert assignments.counts.tolist() == [1, 1, 0, 1]
    assert assignments.offsets.tolist() == [0, 0, 1, 1, 3]
    assert assignments.row[assignments.by_row].tolist() == [1, 3, 3]
    assert assignments.per_row is None


def ragged(rows: int, slots: int) -> Assignments:
    choices = torch.stack([torch.randperm(6)[:slots] for _ in range(rows)])
    choices[torch.rand(rows, slots) < 0.5] = 6
    return group_assignments(choices, num_groups=6, num_assignments=int((choices < 6).sum()))


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_gather_and_sum_have_the_gradients_of_plain_indexing(even: bool, weighted: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    choices = torch.stack([torch.randperm(6)[:3] for _ in range(7)])
    assignments = group_assignments(choices, num_groups=6) if even else ragged(7, 3)
    num_assignments = assignments.row.numel()
    scale = torch.randn(num_assignments, 1, dtype=torch.float64)
    weights = torch.rand(num_assignments, dtype=torch.float64, requires_grad=True)

    values = gather_rows(x, assignments) * scale
    out = sum_assignments(values, assignments, weights if weighted else None)
    terms = x[assignments.row] * scale * (weights[:, None] if weighted else 1.0)
    expected = torch.zeros_like(x).index_add(0, assignments.row, terms)
    torch.testing.assert_close(out, expected)
    inputs = (x, weights) if weighted else (x,)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


def test_no_assignments_sum_to_zero() -> None:
    assignments = group_assignments(torch.full((3, 2), 4), num_groups=4, num_assignments=0)
    assert torch.equal(sum_assignments(torch.zeros(0, 5), assignments), torch.zeros(3, 5))
