"""Sorting token copies by expert, and the way back. Knows no model and no rank.

A token that chose `top_k` experts becomes `top_k` copies; copy `c` belongs to token
`c // top_k`. All functions keep shapes static (no host synchronisation) and are
deterministic: their backwards permute and sum in a fixed order instead of scattering.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def sort_by_expert(
    experts: Int64[Tensor, "tokens top_k"], *, num_experts: int
) -> tuple[Int64[Tensor, " copies"], Int64[Tensor, " experts"]]:
    """Returns the stable order of copies by expert, and how many copies each expert has."""
    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))  # bincount would synchronise on CUDA
    return order, counts


def invert(order: Int64[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
    """Returns the inverse of a permutation: `invert(order)[order[i]] == i`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


class _GatherCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        copies = grad[invert(order)].view(-1, ctx.top_k, grad.shape[-1])
        return copies.sum(1), None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad[invert(order)], None


def gather_copies(
    x: Float[Tensor, "tokens dim"], order: Int64[Tensor, " copies"], *, top_k: int
) -> Float[Tensor, "copies dim"]:
    """Returns every token once for each expert it chose, in the given order of copies."""
    return _GatherCopies.apply(x, order, top_k)  # type: ignore[no-any-return, no-untyped-call]


def permute(
    x: Float[Tensor, "rows dim"], order: Int64[Tensor, " rows"]
) -> Float[Tensor, "rows dim"]:
    """Returns `x[order]` for a permutation `order`, with a gather as its backward too."""
    return _Permute.apply(x, order)  # type: ignore[no-any-return, no-untyped-call]


def combine_copies(
    rows: Float[Tensor, "copies dim"],
    gates: Float[Tensor, "tokens top_k"],
    order: Int64[Tensor, " copies"],
) -> Float[Tensor, "tokens dim"]:
    """Sums each token's copies, weighted by its gates; undoes the order of `gather_copies`."""
    tokens, top_k = gates.shape
    copies = permute(rows, invert(order)).view(tokens, top_k, rows.shape[-1])
    # A batched product of [1, top_k] and [top_k, dim]: no [tokens, top_k, dim] temporary.
    return torch.bmm(gates.to(rows.dtype).unsqueeze(1), copies).squeeze(1)
