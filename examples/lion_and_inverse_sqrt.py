"""A custom optimizer and its schedule: Lion (arXiv 2302.06675) with 1/sqrt(step).

`moetrain extensions=[examples.lion_and_inverse_sqrt] optim.name=lion schedule.name=inverse_sqrt`
"""

import math
import sys
from dataclasses import dataclass

import torch

from moetrain import api
from moetrain import extensions as ext


@dataclass
class LionOptions:
    """`optim.options.…`."""

    beta1: float = 0.9
    beta2: float = 0.99


class Lion(torch.optim.Optimizer):
    """Moves each weight by the sign of its momentum: elementwise, so exact when sharded."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch overloads it
        """Takes a step with the gradients in `param.grad`."""
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                update = momentum.lerp(param.grad, 1 - group["beta1"]).sign_()
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update * group["lr"])
                momentum.lerp_(param.grad, 1 - group["beta2"])


@ext.register_optimizer("lion", options=LionOptions)
def lion(groups: ext.Groups, settings: ext.OptimSettings, options: LionOptions) -> Lion:
    """Returns Lion over the groups, each with its weight decay."""
    return Lion(groups, {"lr": settings.lr, **vars(options)})


@ext.register_schedule("inverse_sqrt")
def inverse_sqrt(step: int, num_steps: int, settings: ext.ScheduleSettings, options: None) -> float:
    """Decays as 1/sqrt(step) after the warm-up."""
    return math.sqrt(max(1, settings.warmup_steps) / max(1, step + 1))


def main() -> None:
    """Trains for some steps with both."""
    mine = ("+model=toy", "optim.name=lion", "optim.lr=3e-4", "schedule.name=inverse_sqrt")
    with api.training(api.compose(*mine, *sys.argv[1:])) as training:
        for batch in training.batches():
            print(f"step {training.num_steps}  loss {training.step(batch).loss:.4f}")


if __name__ == "__main__":
    main()
