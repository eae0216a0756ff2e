"""One matrix product for each group of rows: the arithmetic of the experts.

Owns the choice of backend. A backend is a function of the same signature; they agree to
rounding on every shape, groups without rows included.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

BACKENDS = ("auto", "grouped_mm", "cpu")


def grouped_matmul(
    rows: Float[Tensor, "rows inner"],
    weights: Float[Tensor, "groups inner outer"],
    counts: Int64[Tensor, " groups"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "rows outer"]:
    """Multiplies each group of rows by its own matrix: `out[i] = rows[i] @ weights[group of i]`.

    `rows` are grouped: the first `counts[0]` belong to group 0, and so on. `backend` is
    `cpu` (a loop of dense products), `grouped_mm` (torch's grouped kernel: float32, bfloat16
    or float16, row strides of whole 16 bytes) or `auto` (`cpu` on CPU, else `grouped_mm`).
    Raises ValueError where a backend can't serve the shape. The counts must add up to the rows:
    `cpu` checks it, `grouped_mm` would have to synchronise with the device and doesn't.
    """
    if backend == "auto":
        backend = "cpu" if rows.device.type == "cpu" else "grouped_mm"
    if backend == "cpu":
        sizes = counts.tolist()
        if sum(sizes) != rows.shape[0]:
            raise ValueError(f"counts add up to {sum(sizes)}, but there are {rows.shape[0]} rows")
        return _LoopedMatmul.apply(rows, weights, sizes)  # type: ignore[no-any-return, no-untyped-call]
    if backend == "grouped_mm":
        return _torch_grouped_mm(rows, weights, counts)
    raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")


class _LoopedMatmul(torch.autograd.Function):
    """A dense product for each group, on slices of one output and one gradient buffer.

    Autograd over `weights[g]` would allocate a zero gradient of the whole stack for every
    group; here each group's gradient is written once, straight into its place.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.sizes = sizes
        out = rows.new_empty(rows.shape[0], weights.shape[2])
        start = 0
        for group, size in enumerate(sizes):
            if size:
                part = slice(start, start + size)
                torch.mm(rows[part], weights[group], out=out[part])
                start += size
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        needs_rows, needs_weights, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_weights = torch.empty_like(weights) if needs_weights else None  # keeps strides
        start = 0
        for group, size in enumerate(ctx.sizes):
            part = slice(start, start + size)
            start += size
            if size and grad_rows is not None:
                torch.mm(grad[part], weights[group].t(), out=grad_rows[part])
            if grad_weights is None:
                continue
            if not size:
                grad_weights[group].zero_()
            elif grad_weights[group].is_contiguous():
                torch.mm(rows[part].t(), grad[part], out=grad_weights[group])
            else:  # a transposed view: write its memory in order
                torch.mm(grad[part].t(), rows[part], out=grad_weights[group].t())
        return grad_rows, grad_weights, None


def _torch_grouped_mm(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    if (rows.shape[1] * rows.element_size()) % 16 or (weights.shape[2] * rows.element_size()) % 16:
        raise ValueError(
            f"backend='grouped_mm' needs rows of whole 16 bytes; inner={rows.shape[1]} and "
            f"outer={weights.shape[2]} of {rows.dtype} are not: use backend='cpu' or pad"
        )
    offsets = counts.cumsum(0, dtype=torch.int32)
    product: Tensor = F.grouped_mm(rows, weights, offs=offsets)
    return _ContiguousGrad.apply(product)  # type: ignore[no-any-return, no-untyped-call]


class _ContiguousGrad(torch.autograd.Function):
    """The identity, whose backward hands on a dense gradient.

    The grouped kernel refuses stride-0 gradients, which `sum()` and `expand()` produce.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
