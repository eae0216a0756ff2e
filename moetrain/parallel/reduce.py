"""Collectives over all ranks, whatever their share of the work."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def any_rank(flag: bool) -> bool:
    """Returns on every rank whether the flag is set on any of them.

    The ranks' hosts agree, over gloo: a collective on the GPU would wait until it is idle.
    """
    return any_rank_each(flag)[0]


def any_rank_each(*flags: bool) -> tuple[bool, ...]:
    """Returns on every rank whether each of some flags is set on any of them, by one collective."""
    if dist.get_world_size() == 1:
        return flags
    sums = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(sums)
    return tuple(bool(number) for number in sums.tolist())


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


def said_by_first_rank(say: Callable[[], T]) -> T:
    """Calls `say` on the first rank only, and returns its result on every rank.

    An exception of `say` is raised on the first rank, and as a RuntimeError on the others.
    """
    said: list[Any] = [None, None]
    error = None
    if dist.get_rank() == 0:
        try:
            said[0] = say()
        except Exception as raised:  # the others already wait in the broadcast
            error, said[1] = raised, f"rank 0: {type(raised).__name__}: {raised}"
    dist.broadcast_object_list(said, src=0)
    if error is not None:
        raise error
    if said[1] is not None:
        raise RuntimeError(said[1])
    answer: T = said[0]
    return answer
