"""Sums and lists of small numbers over all ranks."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Returns the sum over all ranks, the same bits on each of them; the input is left alone."""
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool, *, device: torch.device) -> bool:
    """Returns on every rank whether the flag is set on any of them."""
    return bool(sum_over_ranks(torch.tensor(int(flag), device=device)).item())


def gather_over_ranks(values: Tensor) -> Tensor:
    """Returns every rank's values, of one shape on all of them, [ranks, *shape]."""
    found = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(found, values)
    return torch.stack(found)


def gather_objects(mine: T) -> list[T]:
    """Returns every rank's object, in the order of the ranks."""
    found: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
