"""Gradients over all ranks: one global norm, one clip, and whether they are finite."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.parallel.mesh import Meshes
from moetrain.parallel.topology import WEIGHT_AXES


class Gradients:
    """The gradients of a sharded model's parameters."""

    def __init__(
        self, parameters: Iterable[Tensor], meshes: Meshes, *, max_norm: float | None
    ) -> None:
        self._parameters = list(parameters)
        self._group = meshes.group(WEIGHT_AXES)
        self._max_norm = max_norm

    def _local(self) -> list[Tensor]:
        grads = (p.grad for p in self._parameters if p.grad is not None)
        return [g.to_local() if isinstance(g, DTensor) else g for g in grads]

    @torch.no_grad()
    def clip(self) -> float:
        """Scales all gradients so that their global norm is at most `max_norm`.

        Returns the norm before clipping, the same number on every rank. It covers dense and
        expert gradients, each shard once and each replica once: in both views one replica is the
        same set of ranks, so one sum over it counts every element exactly once. Gradients whose
        norm isn't finite are left as they are.
        """
        local = self._local()
        norms = torch.stack(torch._foreach_norm(local)).double()
        total = norms.square().sum()
        dist.all_reduce(total, group=self._group)
        norm = total.sqrt().item()
        if self._max_norm is not None and self._max_norm < norm < math.inf:  # False for nan
            torch._foreach_mul_(local, self._max_norm / norm)
        return norm
