"""A custom metric and callback: each layer's router entropy, and the best loss so far.

`moetrain +model=toy extensions=[examples.layer_entropy_and_best_loss] observe.metrics=[entropy]
train.callbacks=[best_loss] train.validate_every_steps=50` writes the metric into metrics.jsonl and
reports each validation that is the best so far.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moetrain import extensions as ext


@ext.register_metric("entropy")
class LayerEntropy(ext.Metric):
    """`lab/entropy`: the mean entropy of each layer's router in nats, [MoE layers]."""

    def sums(self, output: ext.LossSums, batch: ext.MicroBatch, model: ext.Transformer) -> Tensor:
        """Returns the entropies of a micro-batch's tokens, summed; the caller sums over ranks."""
        return output.routing.entropy_sum

    def values(
        self, sums: Tensor, report: ext.StepReport, model: ext.Transformer
    ) -> Mapping[str, Any]:
        """Returns the means over the global batch's tokens."""
        return {"lab/entropy": (sums / max(1, report.num_tokens)).tolist()}


@dataclass
class BestLossOptions:
    """`train.callback_options.best_loss.…`."""

    margin: float = 0.0
    """The smallest improvement that counts."""


@ext.register_callback("best_loss", options=BestLossOptions)
class BestLoss(ext.Callback):
    """Keeps the lowest validation loss, also in a resumed run."""

    best = float("inf")

    def validation_end(self, trainer: ext.Trainer, metrics: Mapping[str, float]) -> None:
        """Reports on one rank that a validation is the best so far."""
        if (loss := metrics.get("validation/loss", self.best)) < self.best - self.options.margin:
            self.best = loss
            if trainer.place.rank == 0:
                trainer.control.publish("say", f"best validation loss so far: {loss:.4f}")

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint saves."""
        return {"best": self.best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        self.best = state["best"]
