"""Gradients over all ranks: one global norm, one clip, and whether they are finite."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moetrain.device_copies import to_device
from moetrain.local_part import local_part


class Gradients:
    """The gradients of a sharded model's parameters.

    One sum over the ranks of WEIGHT_AXES covers dense and expert gradients, each shard once and
    each replica once: in both views one replica is the same set of ranks, so that it counts every
    element exactly once.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, max_norm: float | None, roles: Sequence[str] = ()
    ) -> None:
        """`roles` are those of the parameters, one each; without them there are no sums by role."""
        self._parameters = list(parameters)
        self._max_norm = max_norm
        self._sums = SumsByRole(roles)
        self._squares = torch.zeros(0, dtype=torch.float64)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of `square_sums_by_role`."""
        return self._sums.roles

    @property
    def clips(self) -> bool:
        """Whether large gradients are scaled down."""
        return self._max_norm is not None

    def _local(self) -> list[Tensor]:
        grads = (p.grad for p in self._parameters if p.grad is not None)
        return [local_part(g) for g in grads]

    @torch.no_grad()
    def square_sum(self) -> Tensor:
        """Returns the sum of squares of this rank's shards, [1] float64."""
        self._squares = torch.stack(torch._foreach_norm(self._local())).double().square()
        return self._squares.sum().view(1)

    def square_sums_by_role(self) -> Tensor:
        """Returns what `square_sum` added up last, by role, [roles] float64."""
        return self._sums.of(self._squares, [p.grad is not None for p in self._parameters])

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Scales gradients of this global norm so that it is at most `max_norm`.

        Gradients whose norm isn't finite are left as they are.
        """
        if (factor := self.clip_factor(norm)) is not None:
            torch._foreach_mul_(self._local(), factor)

    def clip_factor(self, norm: float) -> float | None:
        """Returns what `clip` multiplies gradients of this global norm by; None: nothing."""
        if self._max_norm is not None and self._max_norm < norm < math.inf:  # False for nan
            return self._max_norm / norm
        return None


class SumsByRole:
    """Adds up figures of parameters by their roles, in the same order on each rank."""

    def __init__(self, roles: Sequence[str]) -> None:
        """`roles` are those of the parameters, one each."""
        self.roles = tuple(dict.fromkeys(roles))
        self._roles = list(roles)
        self._among: tuple[list[bool], Tensor] | None = None

    def of(self, values: Tensor, among: list[bool]) -> Tensor:
        """Returns sums of a value for each parameter that is `among`, [roles]."""
        if not self.roles:
            return values.new_zeros(0)
        if self._among is None or self._among[0] != among:  # only where parameters are frozen
            there = [role for role, is_there in zip(self._roles, among, strict=True) if is_there]
            belongs = torch.tensor([[role == one for one in there] for role in self.roles])
            self._among = among, to_device(belongs, values.device)
        # No product with the mask: one infinite value would spoil the sums of all.
        return torch.where(self._among[1], values, 0.0).sum(1)
