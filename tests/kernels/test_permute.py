"""Sorting copies by expert and back."""

import torch

from moetrain.kernels import combine_copies, gather_copies, invert, permute, sort_by_expert


def test_sorting_is_stable_and_counts_every_expert() -> None:
    experts = torch.tensor([[2, 0], [2, 1], [0, 2]])
    order, counts = sort_by_expert(experts, num_experts=4)
    assert experts.flatten()[order].tolist() == [0, 0, 1, 2, 2, 2]
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert counts.tolist() == [2, 1, 3, 0]


def test_invert_undoes_a_permutation() -> None:
    order = torch.randperm(50)
    x = torch.randn(50, 3)
    assert torch.equal(permute(permute(x, order), invert(order)), x)


def test_gather_and_combine_have_the_gradients_of_plain_indexing() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(7, 3, dtype=torch.float64, requires_grad=True)
    experts = torch.stack([torch.randperm(6)[:3] for _ in range(7)])
    order, _ = sort_by_expert(experts, num_experts=6)
    scale = torch.randn(21, 1, dtype=torch.float64)

    out = combine_copies(gather_copies(x, order, top_k=3) * scale, gates, order)
    expected = torch.zeros_like(x).index_add(
        0, order // 3, x[order // 3] * scale * gates.flatten()[order, None]
    )
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (x, gates), grad),
        torch.autograd.grad(expected, (x, gates), grad),
    )
