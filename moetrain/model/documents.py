"""Where documents are in a batch, and attention that stops at their ends.

Computed on the host once per micro-batch, so that no layer synchronises with the device for a
length. Nothing here is of size seq × seq.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from moetrain.device_copies import to_device
from moetrain.kernels.attention import HALF, fused_attention


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of a batch of sequences, in order; none crosses a sequence's end."""

    runs: list[tuple[int, int]]
    """The run-length encoded lengths of documents: (number of neighbours, their length)."""
    positions: Int64[Tensor, "batch seq"]
    """The position of each token in its own document."""
    cu_seqlens: Int32[Tensor, " bounds"]
    """Where each document begins in the flattened batch, and the batch's end: documents + 1."""

    @staticmethod
    def of(starts: Bool[Tensor, "batch seq"], *, device: torch.device) -> "Documents":
        """Returns the documents that begin where `starts`, on the host, is True."""
        starts = starts.clone()
        starts[:, 0] = True
        firsts = starts.flatten().nonzero().squeeze(1)
        bounds = torch.cat((firsts, torch.tensor([starts.numel()])))
        lengths = bounds.diff()
        positions = torch.arange(starts.numel()) - firsts.repeat_interleave(lengths)
        return Documents(
            runs=[(len(list(run)), length) for length, run in groupby(lengths.tolist())],
            positions=to_device(positions.view_as(starts), device),
            cu_seqlens=to_device(bounds.int(), device),
        )


def attend_documents(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
    documents: Documents,
    *,
    kernel: str | None = None,
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Returns causal attention within each document, by `kernel` where it serves that.

    In half precision on CUDA it uses torch's variable-length kernel, else one call for each run of
    equal lengths. Measured on a CPU, that takes as long as attention over whole sequences where
    documents are as long as sequences, and less where they are shorter; groups padded to equal
    lengths are faster for documents of a dozen tokens, and slower for all others.
    """
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # [tokens, heads, head_dim]
    grouped = q.shape[1] != k.shape[1]
    varlen = _varlen_attention() if _has_flash(q) else None
    if varlen is not None:
        longest = max(length for _, length in documents.runs)
        bounds = documents.cu_seqlens
        y: Tensor = varlen(
            *packed, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=grouped
        )
    else:
        sizes = [count * length for count, length in documents.runs]
        runs = zip(documents.runs, *(x.split(sizes) for x in packed), strict=True)
        y = torch.cat(
            [_attend(*(x.unflatten(0, shape) for x in run), kernel=kernel) for shape, *run in runs]
        )
    return y.view(q.shape[0], q.shape[2], *y.shape[1:]).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, kernel: str | None) -> Tensor:
    """Returns the causal attention of [documents, length, heads, head_dim], as [tokens, …]."""
    y = fused_attention(*(x.transpose(1, 2) for x in (q, k, v)), kernel=kernel)
    return y.transpose(1, 2).flatten(0, 1)


def _has_flash(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in HALF and torch.cuda.get_device_capability(x.device) >= (8, 0)


@cache
def _varlen_attention() -> Any:
    """Returns torch's variable-length attention, None where torch is too old."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None
