"""MegaBlocks' compiled module `megablocks_ops` in plain torch, for CPUs and GPUs alike.

`import megablocks` fails without that module, which has to be compiled with nvcc and doesn't
compile on CUDA 13. `megablocks_ops.py` registers this one where it is missing. Signatures are
those of MegaBlocks 0.10.0. Outputs are written into given tensors, and no function synchronises
with the device: shapes follow from arguments, never from values.
"""

import torch
from torch import Tensor


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """Sorts `x` [n] stably by its lowest `end_bit` bits; `iota_out` gets the indices."""
    bits = torch.iinfo(x.dtype).bits
    keys = x & ((1 << end_bit) - 1) if end_bit < bits - 1 else x
    order = torch.argsort(keys, stable=True)
    x_out.copy_(x[order])
    iota_out.copy_(order)


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """Counts the values 0 to `num_bins` - 1 of each row; [n] or [rows, n] → int32 bins."""
    rows = x.reshape(1, -1) if x.ndim == 1 else x
    values = rows.long()
    counts = torch.zeros(rows.shape[0], num_bins, dtype=torch.int32, device=x.device)
    counts.scatter_add_(1, values, torch.ones_like(values, dtype=torch.int32))
    return counts[0] if x.ndim == 1 else counts


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Writes the inclusive cumulative sum of `x` along `dim`."""
    out.copy_(x.cumsum(dim, dtype=x.dtype))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Writes the exclusive cumulative sum of `x` along `dim`."""
    out.copy_(x.cumsum(dim, dtype=x.dtype) - x)


def indices(
    padded_bins: Tensor, block_size: int, block_rows: int, block_columns: int, out: Tensor
) -> None:
    """Writes the column index of every block: a block row has its expert's `block_columns`."""
    ends = padded_bins // block_size
    rows = torch.arange(block_rows, dtype=ends.dtype, device=ends.device)
    expert = torch.searchsorted(ends, rows, right=True)
    columns = torch.arange(block_columns, device=ends.device)
    out.copy_((expert[:, None] * block_columns + columns).flatten())


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """Writes each `x[:, i]` once for every position of bin `i`."""
    out.copy_(x[:, _bin_of_position(bins, out.shape[1])])


def replicate_backward(grad: Tensor, bins: Tensor, out: Tensor) -> None:
    """Writes the sum of each bin's positions."""
    out.zero_().index_add_(1, _bin_of_position(bins, grad.shape[1]), grad)


def _bin_of_position(bins: Tensor, num_positions: int) -> Tensor:
    positions = torch.arange(num_positions, dtype=bins.dtype, device=bins.device)
    return torch.searchsorted(bins, positions, right=True)
