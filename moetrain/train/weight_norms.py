"""Norms of the weights, and of a step's update, by role.

Owns the copies of the weights before an update. Knows no step and no record.
"""

import torch
from torch import Tensor

from moetrain.local_part import local_part
from moetrain.model import Transformer
from moetrain.parallel import WEIGHT_AXES, Meshes, SumsByRole
from moetrain.train.parameter_groups import parameter_roles


class WeightNorms:
    """Measures the weights for a record; all ranks call it alike.

    Each element counts once, in every layout. Two numbers a parameter are added up by one
    collective a record.
    """

    def __init__(
        self,
        model: Transformer,
        meshes: Meshes,
        *,
        updates: bool,
    ) -> None:
        """`updates` says whether the size of updates is measured, which takes a copy of the local
        weights while the optimizer changes them."""
        self._parameters, self._meshes, self._updates = list(model.parameters()), meshes, updates
        self._sums = SumsByRole(list(parameter_roles(model).values()))
        self._before: list[Tensor] | None = None

    @torch.no_grad()
    def remember(self) -> None:
        """Copies the weights before an update, if its size is to be measured."""
        if self._updates:
            self._before = [local_part(p).detach().clone() for p in self._parameters]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Returns `optim/weight_norm/ROLE` and, if measured, `optim/update_ratio/ROLE`.

        The ratio is that of the update since `remember` to the weights before it; 0 where there
        was none, and absent where these were all 0.
        """
        now = [local_part(p).detach() for p in self._parameters]
        parts = [self._square_sums(now)]
        if before := self._before:
            parts.append(self._square_sums(before))
            torch._foreach_sub_(before, now)
            parts.append(self._square_sums(before))
        self._before = None
        (sums,) = self._meshes.sum_together((torch.cat(parts), WEIGHT_AXES))
        norms = sums.sqrt().tolist()
        size = len(self._sums.roles)
        figures = {
            f"optim/weight_norm/{role}": norm
            for role, norm in zip(self._sums.roles, norms[:size], strict=True)
        }
        if not self._updates:
            return figures
        weights, updates = (
            (norms[size : 2 * size], norms[2 * size :])
            if before
            else (
                norms[:size],
                [0.0] * size,
            )
        )
        for role, weight, update in zip(self._sums.roles, weights, updates, strict=True):
            if weight > 0:
                figures[f"optim/update_ratio/{role}"] = update / weight
        return figures

    def _square_sums(self, tensors: list[Tensor]) -> Tensor:
        squares = torch.stack(torch._foreach_norm(tensors)).double().square()
        return self._sums.of(squares, [True] * len(tensors))
