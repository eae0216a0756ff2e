"""The experts on a CPU: one autograd function, one expert at a time for cache locality.

Autograd over `weights[e]` would allocate a zero gradient of the whole stack for every expert, and
keep every intermediate. Here each expert's gradient is written once, in place; gates multiply only
tensors of width `dim`; and the backward pass needs the input and two products, kept or recomputed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.kernels.assignments import Assignments, add_up, row_dots


def cpu_swiglu(
    x: Float[Tensor, "rows dim"],
    gates: Float[Tensor, " assignments"],
    assignments: Assignments,
    gate: Float[Tensor, "experts hidden dim"],
    up: Float[Tensor, "experts hidden dim"],
    down: Float[Tensor, "experts hidden dim"],
    *,
    recompute: bool,
) -> Float[Tensor, "rows dim"]:
    """Computes `expert_swiglu` on a CPU, by dense products on slices."""
    sizes = assignments.host.read()
    if sum(sizes) != assignments.row.numel():
        raise ValueError(
            f"counts add up to {sum(sizes)}, but there are {assignments.row.numel()} assignments"
        )
    keep = torch.is_grad_enabled() and not recompute
    return _CpuSwiGLU.apply(x, gates, gate, up, down, assignments, sizes, keep)  # type: ignore[no-any-return, no-untyped-call]


class _CpuSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        assignments: Assignments,
        sizes: list[int],
        keep: bool,
    ) -> Tensor:
        ctx.assignments, ctx.sizes, ctx.keeps = assignments, sizes, keep
        products = []  # of the gate and up matrices, expert by expert
        y = x.new_empty(assignments.row.numel(), x.shape[1])
        for expert, part in _parts(sizes):
            rows = _take(x, assignments.row[part])
            g, u = matmul(rows, gate[expert].t()), matmul(rows, up[expert].t())
            if keep:
                products += [g, u]
            h = F.silu(g).mul_(u)
            y[part].copy_(matmul(h, down[expert])[: part.stop - part.start])
        # As saved tensors, so that activation checkpointing can free them.
        ctx.save_for_backward(x, gates, gate, up, down, *products)
        return add_up(y, assignments, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, gate, up, down, *products = ctx.saved_tensors
        assignments: Assignments = ctx.assignments
        grad_rows = x.new_empty(assignments.row.numel(), x.shape[1])
        grad_gates = torch.empty_like(gates)
        trained = any(ctx.needs_input_grad[2:5])
        grad_weights = [torch.empty_like(w) for w in (gate, up, down) if trained]
        for expert, size in enumerate(ctx.sizes):
            if size == 0:
                for weight in grad_weights:
                    weight[expert].zero_()
        for expert, part in _parts(ctx.sizes):
            size, weights = part.stop - part.start, gates[part].unsqueeze(1).to(x.dtype)
            rows, grads = _take(x, assignments.row[part]), _take(grad, assignments.row[part])
            if ctx.keeps:
                g, u, *products = products
            else:
                g, u = matmul(rows, gate[expert].t()), matmul(rows, up[expert].t())
            # All but what the gates' own gradient needs is linear in the gate: it scales rows of
            # width dim, before or after the products, and nothing of width hidden.
            grad_h = matmul(grads, down[expert].t())
            a = F.silu(g)
            h = a * u
            grad_gates[part] = row_dots(grad_h[:size], h[:size])
            rows[:size] *= weights
            grads[:size] *= weights
            if trained:
                matmul(h.t(), grads, out=grad_weights[2][expert])
            grad_u = torch.mul(grad_h, a, out=a)
            grad_g = torch.ops.aten.silu_backward(grad_h.mul_(u), g)
            if trained:
                matmul(grad_g.t(), rows, out=grad_weights[0][expert])
                matmul(grad_u.t(), rows, out=grad_weights[1][expert])
            both = matmul(grad_g, gate[expert]).add_(matmul(grad_u, up[expert]))
            grad_rows[part].copy_(both[:size])
        grad_x = add_up(grad_rows, assignments, gates)
        of_weights = grad_weights if trained else (None, None, None)
        return grad_x, grad_gates, *of_weights, None, None, None


def _parts(sizes: list[int]) -> list[tuple[int, slice]]:
    """Returns the experts that have assignments, each with the slice of its assignments."""
    parts, start = [], 0
    for expert, size in enumerate(sizes):
        if size:
            parts.append((expert, slice(start, start + size)))
        start += size
    return parts


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Returns the rows, padded with rows of zeros to one of few sizes.

    oneDNN generates code for every new shape, which costs as much as a small product, and the
    experts' loads change with every step. Rows of zeros contribute nothing.
    """
    size = rows.numel()
    step = max(8, 2 ** ((size - 1).bit_length() - 4))  # at most an eighth more
    out = x.new_empty(-(-size // step) * step, x.shape[1])
    torch.index_select(x, 0, rows, out=out[:size])
    out[size:].zero_()
    return out


def matmul(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Returns `a @ b`, by oneDNN where torch has it.

    torch.mm uses MKL for float32, which reaches half of an AMD processor's speed (it runs AVX2
    where oneDNN runs AVX-512); on others the two are about equal. Measured by
    `python -m benchmarks.moe_layer`, whose limit is timed with both.
    """
    if a.is_cpu and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return product if out is None else out.copy_(product)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
