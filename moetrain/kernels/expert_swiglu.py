"""The computation of the experts: SwiGLU, each assignment of a row with its own expert's matrices.

Owns which backend serves a call. The backends agree up to rounding on every routing, also where
experts have no assignments; an assignment is never dropped.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.kernels.assignments import Assignments, gather_rows, sum_assignments
from moetrain.kernels.cpu_swiglu import cpu_swiglu
from moetrain.kernels.megablocks_ops import INSTALL, megablocks_refuses, megablocks_swiglu
from moetrain.settings.model import BACKENDS

Backend = Callable[[Tensor, Tensor, Assignments, Tensor, Tensor, Tensor], Tensor]


def expert_swiglu(
    x: Float[Tensor, "rows dim"],
    gates: Float[Tensor, " assignments"],
    assignments: Assignments,
    gate: Float[Tensor, "experts hidden dim"],
    up: Float[Tensor, "experts hidden dim"],
    down: Float[Tensor, "experts hidden dim"],
    *,
    backend: str = "auto",
    preferred: str | None = None,
    recompute: bool = False,
) -> Float[Tensor, "rows dim"]:
    """Returns for each row the sum over its assignments c, of expert e, of

    `gates[c] * (silu(row @ gate[e].T) * (row @ up[e].T)) @ down[e]` (arXiv 2002.05202).

    `gates` are in the order of `assignments.row`. `auto` takes the `preferred` backend, if any; if
    that refuses the shape, it takes the first that serves it, without measuring. With `recompute`
    only the rows are kept, and the backward pass recomputes what is `hidden` wide. Raises
    ValueError where a backend can't serve the shape, the device or this machine.
    """
    dtypes = {tensor.dtype for tensor in (x, gate, up, down)}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"rows and weights must be of one dtype, not {names}: cast them")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if not assignments.row.numel():
        return without_assignments(x, gates, assignments, gate, up, down)
    if backend == "auto":
        backend = _serving(x, assignments, gate, up, down, preferred=preferred)
    if backend == "cpu":
        return cpu_swiglu(x, gates, assignments, gate, up, down, recompute=recompute)
    compute = GROUPED[backend]
    if recompute and torch.is_grad_enabled():
        result: Tensor = checkpoint(
            compute,
            x,
            gates,
            assignments,
            gate,
            up,
            down,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return result
    return compute(x, gates, assignments, gate, up, down)


def without_assignments(
    x: Tensor, gates: Tensor, assignments: Assignments, *weights: Tensor | None
) -> Tensor:
    """Returns zeros, with a zero gradient for every argument, without calling any backend.

    A rank whose experts get nothing comes here: kernels would be launched on empty grids, Triton
    would autotune on empty inputs, and some grouped products of torch assert that there are rows.
    """
    nothing = x[assignments.row].sum() + gates.sum()
    for weight in weights:
        if weight is not None:
            nothing = nothing + weight[:0].sum()
    return torch.zeros_like(x) + nothing.to(x.dtype)


def _serving(
    x: Tensor,
    assignments: Assignments,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    preferred: str | None,
) -> str:
    names = ["cpu"] if x.device.type == "cpu" else ["megablocks", "grouped_mm", "cpu"]
    if preferred is not None:
        names.insert(0, preferred)
    return next(name for name in names if refuses(name, x, assignments, gate, up, down) is None)


def refuses(
    backend: str, x: Tensor, assignments: Assignments, gate: Tensor, up: Tensor, down: Tensor
) -> str | None:
    """Returns why a backend can't serve a shape here, with the way out; None where it can."""
    if backend == "megablocks":
        return megablocks_refuses(x, assignments, gate, up, down)
    if backend == "grouped_mm":
        return grouped_mm_refuses(x, gate)
    return None  # the cpu backend takes any shape; it is slow on a GPU


def slow_because(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Returns why a GPU has no fast backend but MegaBlocks', with the way to it; None if it has.

    `capability` is the GPU's compute capability, `dtype` that of the products.
    """
    if capability >= (9, 0) and dtype == torch.bfloat16:
        return None
    what = (
        f"{str(dtype).removeprefix('torch.')} on compute capability {capability[0]}.{capability[1]}"
    )
    return (
        f"torch has no grouped product for {what}: F.grouped_mm multiplies expert by expert there, "
        f"and waits for the device each time (pytorch#186620). MegaBlocks' kernels don't: {INSTALL}"
    )


def grouped_mm_refuses(x: Tensor, gate: Tensor) -> str | None:
    """Returns why torch's grouped product can't serve a shape, with the way out; None if it can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"backend='grouped_mm' has no products of {x.dtype}: cast, or use backend='cpu'"
    dim, hidden = gate.shape[2], gate.shape[1]
    if (dim * x.element_size()) % 16 or (hidden * x.element_size()) % 16:
        return (
            f"backend='grouped_mm' needs rows of whole 16 bytes; dim={dim} and hidden={hidden} of "
            f"{x.dtype} are not: choose multiples of {16 // x.element_size()}, or backend='cpu'"
        )
    return None


def _grouped_mm_swiglu(
    x: Tensor, gates: Tensor, assignments: Assignments, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    if reason := grouped_mm_refuses(x, gate):
        raise ValueError(reason)
    ends = assignments.counts.cumsum(0, dtype=torch.int32)
    rows = gather_rows(x, assignments)
    g = _grouped_mm(rows, gate.transpose(1, 2), ends)
    u = _grouped_mm(rows, up.transpose(1, 2), ends)
    return sum_assignments(_grouped_mm(_SwiGLU.apply(g, u), down, ends), assignments, gates)  # type: ignore[no-untyped-call]


def _grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weights, offs=ends)


GROUPED: Mapping[str, Backend] = {"megablocks": megablocks_swiglu, "grouped_mm": _grouped_mm_swiglu}


class _SwiGLU(torch.autograd.Function):
    """silu(g) * u, which saves only g and u for its backward pass."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * u, g), F.silu(g).mul_(grad)
