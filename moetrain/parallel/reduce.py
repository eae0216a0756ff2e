"""What all ranks tell each other, whatever their part of the work."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def any_rank(flag: bool, *, device: torch.device) -> bool:
    """Returns on every rank whether the flag is set on any of them."""
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags.item())


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
