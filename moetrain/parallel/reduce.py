"""Sums of small numbers over all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Returns the sum over all ranks, the same bits on each of them; the input is left alone."""
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool, *, device: torch.device) -> bool:
    """Returns on every rank whether the flag is set on any of them."""
    return bool(sum_over_ranks(torch.tensor(int(flag), device=device)).item())
