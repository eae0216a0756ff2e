"""A custom optimizer and its schedule: Signum (arXiv 1802.04434) with 1/sqrt(step).

`moetrain extensions=[examples.signum_and_inverse_sqrt] optim.name=signum
schedule.name=inverse_sqrt`
"""

import math
import sys
from dataclasses import dataclass

import torch

from moetrain import api
from moetrain import extensions as ext


@dataclass
class SignumOptions:
    """`optim.options.…`."""

    beta: float = 0.9


class Signum(torch.optim.Optimizer):
    """Moves each weight by the sign of its momentum: elementwise, so exact when sharded."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch overloads it
        """Takes a step with the gradients in `param.grad`."""
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 1 - group["beta"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(momentum.sign() * group["lr"])


@ext.register_optimizer("signum", options=SignumOptions)
def signum(groups: ext.Groups, settings: ext.OptimSettings, options: SignumOptions) -> Signum:
    """Returns Signum over the groups, each with its weight decay."""
    return Signum(groups, {"lr": settings.lr, **vars(options)})


@ext.register_schedule("inverse_sqrt")
def inverse_sqrt(step: int, num_steps: int, settings: ext.ScheduleSettings, options: None) -> float:
    """Decays as 1/sqrt(step) after the warm-up."""
    return math.sqrt(max(1, settings.warmup_steps) / max(1, step + 1))


def main() -> None:
    """Trains for some steps with both."""
    mine = ("+model=toy", "optim.name=signum", "optim.lr=3e-4", "schedule.name=inverse_sqrt")
    with api.training(api.compose(*mine, *sys.argv[1:])) as training:
        for batch in training.batches():
            print(f"step {training.num_steps}  loss {training.step(batch).loss:.4f}")


if __name__ == "__main__":
    main()
