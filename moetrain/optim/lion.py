"""Lion (arXiv 2302.06675): each weight moves by the sign of its momentum."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from moetrain.local_part import local_part
from moetrain.optim.optimizer import Groups
from moetrain.registries import OPTIMIZERS
from moetrain.settings import OptimSettings


class Lion(Optimizer):
    """Lion on this rank's parts: it is elementwise, so that the parts give what the whole would."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch overloads it
        """Takes a step; `closure` is None."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            weights = [local_part(p) for p in parameters]
            gradients = [local_part(p.grad) for p in parameters]
            momenta = [local_part(self._momentum_of(p)) for p in parameters]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


@OPTIMIZERS.register("lion")
def lion(groups: Groups, settings: OptimSettings, options: None) -> Optimizer:
    """Returns Lion; its authors take `optim.betas=[0.9,0.99]`, and a third of AdamW's rate."""
    return Lion(groups, {"lr": settings.lr, "betas": settings.betas})
