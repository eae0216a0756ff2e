"""The experts' SwiGLU by the kernels of MegaBlocks (arXiv 2211.15841) and its sparse toolkit stk.

Owns every import of `megablocks`, `stk` and `triton`, all of them lazy: the package works without
them, and `unavailable_because` says what is missing. Leaves the choice of backend to others.

Each expert's assignments are padded to whole blocks of 128. The intermediate is then a block-sparse
matrix [padded rows, experts * hidden], in which a row has the blocks of its expert, and each of
the three products is one kernel over all experts.
"""

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moetrain.kernels import megablocks_ops_in_torch
from moetrain.kernels.assignments import Assignments, gather_rows, sum_assignments

BLOCK = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACKAGES = {"triton": "triton", "stk": "stanford-stk", "megablocks": "megablocks"}
INSTALL = "`make kernels` installs what is needed (the pip line is in docs/kernels.md)"


class _Libraries(NamedTuple):
    kernels: Any
    stk: Any
    interpreted: bool
    """Whether Triton built the kernels for its interpreter, which runs them on CPU tensors."""


@functools.cache
def _libraries() -> _Libraries:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing optional parts
        try:
            import megablocks_ops  # noqa: F401
        except ImportError:
            sys.modules["megablocks_ops"] = megablocks_ops_in_torch
        import megablocks.backend.kernels as kernels
        import stk
        import stk.ops
        from triton.runtime.interpreter import InterpretedFunction
    copying = [kernels._padded_copy, kernels._padded_copy_wgrad]
    interpreted = isinstance(copying[0].fn, InterpretedFunction)
    if interpreted:  # no device, so no autotuning
        for kernel in copying:
            kernel.configs = kernel.configs[-1:]
    return _Libraries(kernels, stk, interpreted)


@functools.cache
def _missing_packages() -> list[str]:  # called in every forward pass
    return [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]


def unavailable_because(device: torch.device | str | None = None) -> str | None:
    """Returns why the backend can't run on a device, with the way out; None where it can.

    Without a device: on CUDA where there is one, else on the CPU.
    """
    if missing := _missing_packages():
        return f"{', '.join(missing)} not installed: {INSTALL}"
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device: use backend='cpu'"
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "the kernels are for CUDA, and on a CPU run only in Triton's interpreter, which is for "
            "tests: set TRITON_INTERPRET=1 before Python starts, or use backend='cpu'"
        )
    if kind not in ("cpu", "cuda"):
        return f"the kernels run on CUDA, not on {kind}"
    try:
        interpreted = _libraries().interpreted
    except Exception as error:  # another version of a library may raise anything
        return f"importing megablocks failed ({type(error).__name__}: {error}): {INSTALL}"
    if interpreted and kind == "cuda":
        return "TRITON_INTERPRET=1 is set, so the kernels would run on the CPU: unset it"
    if not interpreted and kind == "cpu":
        return "TRITON_INTERPRET=1 was set after triton was imported: set it before Python starts"
    return None


def megablocks_swiglu(
    x: Float[Tensor, "rows dim"],
    gates: Float[Tensor, " assignments"],
    assignments: Assignments,
    gate: Float[Tensor, "experts hidden dim"],
    up: Float[Tensor, "experts hidden dim"],
    down: Float[Tensor, "experts hidden dim"],
) -> Float[Tensor, "rows dim"]:
    """Returns for each row the gated sum of its experts' outputs; zero if it has no expert.

    Assignment `c` of row `x` at expert `e` adds `gates[c] * (silu(x @ gate[e].T) * (x @ up[e].T)) @
    down[e]`. `gates` are in the order of `assignments.row` and stay float32; their gradient is
    rounded to `x`'s dtype once. Any `dim` and `hidden` are served exactly: what isn't a multiple
    of 128 is padded with zeros, which copies the weights (as does a non-contiguous weight).
    Float32 products are TF32 on CUDA, unless TRITON_F32_DEFAULT=ieee is set.
    Shapes depend on the number of padded rows: it synchronises with the device once, in the forward
    pass, where the host doesn't know the counts of `assignments` yet.

    Raises ValueError, with the reason and the way out, where the backend can't run (see
    `unavailable_because`), for dtypes that the kernels don't multiply, and for sizes past their
    32-bit offsets: padded rows * dim, padded rows * hidden and experts * hidden * dim.
    """
    if reason := megablocks_refuses(x, assignments, gate, up, down):
        raise ValueError(reason)
    stk = _libraries().stk
    experts, hidden, dim = gate.shape
    width = _rounded_up(hidden)
    gate, up, down = (_stacked(weight, hidden=width) for weight in (gate, up, down))
    with torch.no_grad():
        bins = assignments.counts.cumsum(0)
        padded_bins = _rounded_up(assignments.counts).cumsum(0)
        position = torch.arange(assignments.row.numel(), device=x.device)
        bin_ids = torch.searchsorted(bins, position, right=True)
        # MegaBlocks numbers assignments by token: assignment j of row r is r * top_k + j.
        order = position if assignments.per_row is None else assignments.slot
        places = [t.int() for t in (order, bin_ids, bins, padded_bins)]
    if assignments.per_row is None:
        top_k, weights = 1, gates.contiguous()
        rows = gather_rows(x, assignments)
    else:
        # by_row is a permutation, so the backward pass adds one value to each element: its order
        # doesn't matter, and the gradient is deterministic.
        top_k, weights = assignments.per_row, gates.index_select(0, assignments.by_row)
        rows = x.contiguous()

    padded = _Padding(places, sum(map(_rounded_up, assignments.host.read())), top_k)
    gathered = _PaddedGather.apply(_padded(rows, (0, -dim % BLOCK)), padded)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        blocks = _block_indices(
            padded_bins // BLOCK, height=gathered.shape[0] // BLOCK, width=width // BLOCK
        )
    shape = (gathered.shape[0], experts * width)
    # A topology needs the indices only; a meta tensor stands for its values without memory.
    unset = torch.empty(blocks[0].numel(), BLOCK, BLOCK, dtype=x.dtype, device="meta")
    topology = stk.Matrix(shape, unset, *blocks)
    opened = stk.ops.sdd(gathered, gate.t(), topology).data  # [blocks, 128, 128]
    passed = stk.ops.sdd(gathered, up.t(), topology).data
    inner = stk.Matrix(shape, F.silu(opened) * passed, *blocks)
    outputs = stk.ops.dsd(inner, down)  # [padded rows, dim]
    out = _PaddedScatter.apply(outputs, weights, padded)[:, :dim]  # type: ignore[no-untyped-call]
    if assignments.per_row is None:
        out = sum_assignments(out, assignments)
    return out  # type: ignore[no-any-return]


class _Padding(NamedTuple):
    """Where rows are among the padded ones of all experts."""

    places: list[Tensor]
    """What MegaBlocks calls indices, bin_ids, bins and padded_bins; int32."""
    num_rows: int
    top_k: int


# MegaBlocks' own autograd functions ask the device for the number of padded rows, once in the
# forward and once in the backward pass: a host sync each. Its kernels don't.


def _padded_rows(x: Tensor, weights: Tensor | None, padded: _Padding) -> Tensor:
    """Returns the rows [padded rows, dim], scaled by weights if given, and zeros between them."""
    indices, *others = padded.places
    out = x.new_zeros(padded.num_rows, x.shape[1])
    _libraries().kernels._padded_copy[(len(indices),)](
        *(x, out, indices, others[0], weights, *others[1:]),
        NUM_COLUMNS=x.shape[1],
        A_TO_B=True,
        TOP_K=padded.top_k,
        SCALE=weights is not None,
    )
    return out


def _summed_rows(x: Tensor, weights: Tensor | None, padded: _Padding) -> Tensor:
    """Returns each row's sum of its padded rows, scaled by weights if given."""
    indices, bin_ids, *bins = padded.places
    kernels = _libraries().kernels
    out: Tensor = kernels.padded_scatter(x, indices, bin_ids, weights, *bins, padded.top_k)
    return out


class _PaddedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padded: _Padding) -> Tensor:
        ctx.padded = padded
        return _padded_rows(x, None, padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed_rows(grad.contiguous(), None, ctx.padded), None


class _PaddedScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, padded: _Padding) -> Tensor:
        ctx.padded = padded
        ctx.save_for_backward(x, weights)
        return _summed_rows(x, weights, padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weights), padded = ctx.saved_tensors, ctx.padded
        grad = grad.contiguous()
        of_weights = _libraries().kernels.padded_scatter_wgrad(
            x, grad, *padded.places, padded.top_k
        )
        return _padded_rows(grad, weights, padded), of_weights, None


def megablocks_refuses(
    x: Tensor, assignments: Assignments, gate: Tensor, up: Tensor, down: Tensor
) -> str | None:
    """Returns why the kernels can't serve these, with the way out; None if they can."""
    reason = unavailable_because(x.device)
    if reason:
        return f"backend='megablocks' can't run here: {reason}"
    if not gate.shape == up.shape == down.shape:
        shapes = ", ".join(str(tuple(weight.shape)) for weight in (gate, up, down))
        return f"gate, up and down must be of one shape, not {shapes}"
    dtypes = {tensor.dtype for tensor in (x, gate, up, down)}
    if len(dtypes) > 1 or x.dtype not in DTYPES:
        return (
            f"backend='megablocks' needs rows and weights of one dtype among {_names(DTYPES)}, "
            f"not {_names(dtypes)}: cast them, or use backend='cpu'"
        )
    if x.dtype == torch.bfloat16 and _libraries().interpreted:
        return "Triton's interpreter computes wrong products of bfloat16: use float32 or float16"
    experts, hidden, dim = (gate.shape[0], *map(_rounded_up, gate.shape[1:]))
    num_assignments = assignments.row.numel()
    # An upper bound, without a host sync: each expert with assignments adds at most 127 rows.
    padded = num_assignments + min(num_assignments, experts) * (BLOCK - 1)
    for what, elements in {
        f"{padded} padded rows * dim {dim}": padded * dim,
        f"{padded} padded rows * hidden {hidden}": padded * hidden,
        f"{experts} experts * hidden {hidden} * dim {dim}": experts * hidden * dim,
    }.items():
        if elements >= 2**31:
            return (
                f"{what} = {elements} is past the 32-bit offsets (2**31) of MegaBlocks' kernels: "
                "use fewer tokens or experts on a rank, or backend='grouped_mm'"
            )
    return None


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _rounded_up(size: Any) -> Any:
    """Returns a size, or a tensor of sizes, rounded up to whole blocks."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _stacked(weight: Tensor, *, hidden: int) -> Tensor:
    """Returns all experts' weights as one dense [experts * hidden, dim], padded to whole blocks.

    stk recognises a transposed operand by its strides, and takes any other strides for a plain one.
    """
    missing = (0, -weight.shape[2] % BLOCK, 0, hidden - weight.shape[1])
    return _padded(weight, missing).flatten(0, 1).contiguous()


def _padded(tensor: Tensor, missing: tuple[int, ...]) -> Tensor:
    """Returns a tensor padded with zeros; itself if no padding is needed: `F.pad` would copy it."""
    return F.pad(tensor, missing) if any(missing) else tensor


def _block_indices(ends: Tensor, *, height: int, width: int) -> list[Tensor]:
    """Returns the indices of the intermediate's blocks, in the order that `stk.Matrix` takes them.

    `ends` [experts] is the inclusive cumulative sum of block rows per expert; each of the `height`
    block rows has its expert's `width` columns. All indices are int32: those of MegaBlocks are
    int16, which overflows from 32,768 columns on, and in its products from 256.

    An expert's blocks are a dense rectangle, so their order by column follows from its corner and
    its height, without a sort.
    """
    starts = F.pad(ends, (1, 0))[:-1]
    row = torch.arange(height, device=ends.device)
    column = torch.arange(width, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True)[:, None]  # [height, 1]
    first, tall = starts[expert], (ends - starts)[expert]
    # The transposed order: the same list positions per expert, filled column by column.
    within = (row[:, None] - first) * width + column  # [height, width]
    row_t = first + within % tall
    offsets_t = starts[:, None] * width + (ends - starts)[:, None] * column  # [experts, width]
    indices = (
        row[:, None].expand(height, width),
        expert * width + column,
        torch.arange(height + 1, device=ends.device) * width,
        row_t,
        F.pad(offsets_t.flatten(), (0, 1), value=height * width),
        row_t * width + within // tall,
    )
    return [index.int().flatten() for index in indices]
