"""A custom router: cosine similarity with a learned temperature (arXiv 2204.09179).

`moetrain +model=toy extensions=[examples.cosine_router] model.router.name=cosine` trains with it;
`moetrain verify` with the same arguments shows that layouts agree.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain import api
from moetrain.extensions import Choice, Router, register_router
from moetrain.settings import ModelSettings


@dataclass
class CosineOptions:
    """`model.router.options.…`."""

    temperature: float = 0.1
    """The initial divisor of the similarities."""


@register_router("cosine", options=CosineOptions)
class CosineRouter(Router):
    """Scores experts by the angle between a token and the expert's vector."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        self.scale = nn.Parameter(torch.empty(1))  # initialised to one, like every vector

    def logits(self, x: Tensor, choice: Choice) -> Tensor:
        """Returns similarities divided by the temperature, [tokens, experts]."""
        experts = F.normalize(self.weight.float(), dim=-1)
        similarity = F.linear(F.normalize(x, dim=-1), experts * self.scale.float())
        return similarity / float(self.options.temperature)


def main() -> None:
    """Trains for some steps and prints the learned scale of each layer."""
    config = api.compose("+model=toy", "model.router.name=cosine", *sys.argv[1:])
    with api.training(config) as training:
        for batch in training.batches():
            report = training.step(batch)
            print(f"step {training.num_steps}  loss {report.loss:.4f}")
        for layer, moe in enumerate(training.model.moe_layers()):
            print(f"layer {layer}: scale {dict(moe.router.named_parameters())['scale'].item():.4f}")


if __name__ == "__main__":
    main()
