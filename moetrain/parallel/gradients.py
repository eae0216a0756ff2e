"""Gradients over all ranks: one norm, one clip, one answer to whether they are finite."""

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

        Returns the norm before, the same number on every rank: dense and expert gradients
        together, each shard counted once and each replica once. In both views one replica is
        the same set of ranks, so one sum over it takes in every element exactly once.
        Gradients that are not finite are left alone, and so is the norm that says so.
        """
        local = self._local()
        norms = torch.stack(torch._foreach_norm(local)).double()
        total = norms.square().sum()
        dist.all_reduce(total, group=self._group)
        norm = total.sqrt().item()
        if self._max_norm is not None and self._max_norm < norm < math.inf:  # False for nan
            torch._foreach_mul_(local, self._max_norm / norm)
        return norm
