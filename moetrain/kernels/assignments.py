"""Assignments of rows to groups, and the sums back over each row's assignments.

A token that chose three experts has three assignments, grouped by expert; a token that is sent to
two ranks has two, grouped by rank. Shapes follow from the arguments' shapes and from numbers that
the caller has (no host synchronisation), and the sums run in a fixed order. Knows no model and no
rank.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


class HostCounts:
    """The assignments in each group, as numbers on the host."""

    def __init__(self, counts: "Tensor | list[int]") -> None:
        """`counts` [groups]: numbers that the caller has, or a tensor, read when first needed."""
        self._counts = counts

    def read(self) -> list[int]:
        """Returns the numbers; the first call waits for the device where they are a tensor."""
        if isinstance(self._counts, Tensor):
            self._counts = self._counts.tolist()
        counts: list[int] = self._counts
        return counts


class Assignments(NamedTuple):
    """Which rows go to which groups: one assignment for each row and each group that takes it."""

    row: Tensor
    """The row that each assignment is of, [assignments] int64; assignments are grouped."""
    counts: Tensor
    """Assignments in each group, [groups] int64."""
    by_row: Tensor
    """The assignments, ordered by row, [assignments] int64.

    Row r has `by_row[offsets[r]:offsets[r + 1]]`.
    """
    offsets: Tensor
    """Where each row's assignments begin in `by_row`, [rows + 1] int64."""
    per_row: int | None
    """The assignments of each row, if all rows have equally many: known without a host sync."""
    slot: Tensor
    """The choice of each assignment, [assignments] int64: an index into the flat [rows, slots]."""
    host: HostCounts
    """`counts` on the host."""


def group_assignments(
    choices: Int64[Tensor, "rows slots"],
    *,
    num_groups: int,
    num_assignments: int | None = None,
    order: Int64[Tensor, " all_slots"] | None = None,
    host: HostCounts | None = None,
) -> Assignments:
    """Returns one assignment for each row and each group that it chose, grouped, in stable order.

    A choice of `num_groups` is an empty slot. Where there may be any, the caller must pass
    `num_assignments`, the number of choices that aren't empty, so that the host needn't wait for
    the device. `order` is the stable order of the flat choices and `host` the counts, if the caller
    has them already.
    """
    rows, slots = choices.shape
    flat = choices.reshape(-1)
    slot = (torch.argsort(flat, stable=True) if order is None else order)[:num_assignments]
    # bincount would synchronise on CUDA.
    counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_groups]
    host = host or HostCounts(counts)
    if num_assignments is None:
        by_row = torch.empty_like(slot)
        by_row[slot] = torch.arange(slot.numel(), device=slot.device)
        offsets = torch.arange(0, rows * slots + 1, slots, device=flat.device)
        return Assignments(slot // slots, counts, by_row, offsets, slots, slot, host)
    by_row = torch.argsort(slot)  # slots are numbered row by row; empty ones leave gaps
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum((choices < num_groups).sum(1), 0, out=offsets[1:])
    return Assignments(slot // slots, counts, by_row, offsets, None, slot, host)


def gather_rows(
    x: Float[Tensor, "rows dim"], assignments: Assignments
) -> Float[Tensor, "assignments dim"]:
    """Returns the row of each assignment."""
    return _GatherRows.apply(x, assignments)  # type: ignore[no-any-return, no-untyped-call]


def sum_assignments(
    values: Float[Tensor, "assignments dim"],
    assignments: Assignments,
    weights: Float[Tensor, " assignments"] | None = None,
) -> Float[Tensor, "rows dim"]:
    """Returns for each row the sum of its assignments' values, weighted if weights are given."""
    return _SumAssignments.apply(values, assignments, weights)  # type: ignore[no-any-return, no-untyped-call]


def add_up(values: Tensor, assignments: Assignments, weights: Tensor | None = None) -> Tensor:
    """Does what `sum_assignments` does, without a backward pass of its own."""
    rows = assignments.offsets.numel() - 1
    if values.shape[0] == 0:
        return values.new_zeros(rows, values.shape[1])
    if weights is not None:
        weights = weights.to(values.dtype)
    # One pass, in float32 at least, and no temporary of the values' size.
    return F.embedding_bag(
        assignments.by_row,
        values,
        assignments.offsets,
        mode="sum",
        per_sample_weights=None if weights is None else weights[assignments.by_row],
        include_last_offset=True,
    )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, assignments: Assignments) -> Tensor:
        ctx.assignments = assignments
        return x[assignments.row]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return add_up(grad, ctx.assignments), None


class _SumAssignments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, assignments: Assignments, weights: Tensor | None
    ) -> Tensor:
        ctx.assignments = assignments
        ctx.save_for_backward(values if weights is not None else None, weights)
        return add_up(values, assignments, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        values, weights = ctx.saved_tensors
        rows = grad[ctx.assignments.row]
        if weights is None:
            return rows, None, None
        return rows * weights.unsqueeze(1).to(rows.dtype), None, row_dots(rows, values)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Returns the dot product of each row of `a` with that of `b`, [rows], at least float32."""
    if a.is_cpu and a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1)  # no temporary
    # On CUDA a batch of products is limited to 65,535.
    return (a * b).sum(1, dtype=torch.promote_types(a.dtype, torch.float32))
