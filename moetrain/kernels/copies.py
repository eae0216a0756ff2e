"""Copies of rows, grouped, and the sums back over each row's copies. Knows no model and no rank.

A token that chose three experts becomes three copies of its row, grouped by expert; a token that is
sent to two ranks becomes two, grouped by rank. Both are `Copies`. Shapes follow from the arguments'
shapes and from numbers that the caller has (no host synchronisation), and the sums run in a fixed
order.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


class Copies(NamedTuple):
    """Which rows go to which groups: one copy of a row for each group that takes it."""

    row: Tensor
    """The row that each copy is of, [copies] int64; copies are grouped."""
    counts: Tensor
    """Copies in each group, [groups] int64."""
    by_row: Tensor
    """The copies, ordered by row, [copies] int64: row r has `by_row[offsets[r]:offsets[r + 1]]`."""
    offsets: Tensor
    """Where each row's copies begin in `by_row`, [rows + 1] int64."""
    per_row: int | None
    """The copies of each row, if all rows have equally many: known without a host sync."""
    slot: Tensor
    """The choice of each copy, [copies] int64: an index into flattened choices [rows, slots]."""


def group_copies(
    choices: Int64[Tensor, "rows slots"],
    *,
    num_groups: int,
    num_copies: int | None = None,
    order: Int64[Tensor, " all_slots"] | None = None,
) -> Copies:
    """Returns one copy for each row and each group that it chose, grouped, in stable order.

    A choice of `num_groups` is an empty slot. Where there may be any, the caller must pass
    `num_copies`, the number of choices that aren't empty, so that the host needn't wait for the
    device. `order` is the stable order of the flat choices, if the caller has sorted them already.
    """
    rows, slots = choices.shape
    flat = choices.reshape(-1)
    slot = (torch.argsort(flat, stable=True) if order is None else order)[:num_copies]
    # bincount would synchronise on CUDA.
    counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_groups]
    if num_copies is None:
        by_row = torch.empty_like(slot)
        by_row[slot] = torch.arange(slot.numel(), device=slot.device)
        offsets = torch.arange(0, rows * slots + 1, slots, device=flat.device)
        return Copies(slot // slots, counts, by_row, offsets, slots, slot)
    by_row = torch.argsort(slot)  # slots are numbered row by row; empty ones leave gaps
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum((choices < num_groups).sum(1), 0, out=offsets[1:])
    return Copies(slot // slots, counts, by_row, offsets, None, slot)


def gather_copies(x: Float[Tensor, "rows dim"], copies: Copies) -> Float[Tensor, "copies dim"]:
    """Returns the row of each copy."""
    return _GatherCopies.apply(x, copies)  # type: ignore[no-any-return, no-untyped-call]


def sum_copies(
    values: Float[Tensor, "copies dim"],
    copies: Copies,
    weights: Float[Tensor, " copies"] | None = None,
) -> Float[Tensor, "rows dim"]:
    """Returns for each row the sum of its copies' values, weighted if weights are given."""
    return _SumCopies.apply(values, copies, weights)  # type: ignore[no-any-return, no-untyped-call]


def add_up(values: Tensor, copies: Copies, weights: Tensor | None = None) -> Tensor:
    """Does what `sum_copies` does, without a backward pass of its own."""
    rows = copies.offsets.numel() - 1
    if values.shape[0] == 0:
        return values.new_zeros(rows, values.shape[1])
    if weights is not None:
        weights = weights.to(values.dtype)
    if values.device.type == "cpu":  # one pass, no temporary
        by_row = None if weights is None else weights[copies.by_row]
        return F.embedding_bag(
            copies.by_row,
            values,
            copies.offsets,
            mode="sum",
            per_sample_weights=by_row,
            include_last_offset=True,
        )
    if weights is not None and copies.per_row is not None:
        # A batched product of [1, copies] and [copies, dim] for each row: no weighted temporary.
        terms = values[copies.by_row].view(rows, copies.per_row, -1)
        return torch.bmm(weights[copies.by_row].view(rows, 1, -1), terms).squeeze(1)
    if weights is not None:
        values = values * weights.unsqueeze(1)
    if copies.per_row is not None:
        return values[copies.by_row].view(rows, copies.per_row, -1).sum(1)
    # segment_reduce adds in the dtype of its input, and would round at each step in bfloat16.
    exact = values[copies.by_row].to(torch.promote_types(values.dtype, torch.float32))
    total = torch.segment_reduce(exact, "sum", offsets=copies.offsets, axis=0, initial=0)
    return total.to(values.dtype)


class _GatherCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x[copies.row]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return add_up(grad, ctx.copies), None


class _SumCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, copies: Copies, weights: Tensor | None) -> Tensor:
        ctx.copies = copies
        ctx.save_for_backward(values if weights is not None else None, weights)
        return add_up(values, copies, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        values, weights = ctx.saved_tensors
        rows = grad[ctx.copies.row]
        if weights is None:
            return rows, None, None
        return rows * weights.unsqueeze(1).to(rows.dtype), None, row_dots(rows, values)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Returns the dot product of each row of `a` with that of `b`, [rows], at least float32."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1)  # no temporary
    return (a * b).sum(1, dtype=torch.float32)
