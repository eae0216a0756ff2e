"""Gradients over all ranks: one global norm, one clip, and whether they are finite."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Gradients:
    """The gradients of a sharded model's parameters.

    One sum over the ranks of WEIGHT_AXES covers dense and expert gradients, each shard once and
    each replica once: in both views one replica is the same set of ranks, so that it counts every
    element exactly once.
    """

    def __init__(self, parameters: Iterable[Tensor], *, max_norm: float | None) -> None:
        self._parameters = list(parameters)
        self._max_norm = max_norm

    def _local(self) -> list[Tensor]:
        grads = (p.grad for p in self._parameters if p.grad is not None)
        return [g.to_local() if isinstance(g, DTensor) else g for g in grads]

    @torch.no_grad()
    def square_sum(self) -> Tensor:
        """Returns the sum of squares of this rank's shards, [1] float64."""
        norms = torch.stack(torch._foreach_norm(self._local())).double()
        return norms.square().sum().view(1)

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Scales gradients of this global norm so that it is at most `max_norm`.

        Gradients whose norm isn't finite are left as they are.
        """
        if self._max_norm is not None and self._max_norm < norm < math.inf:  # False for nan
            torch._foreach_mul_(self._local(), self._max_norm / norm)
