"""What a step reports, and the metrics of extensions that are computed from it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moetrain.model import LossSums, Transformer
from moetrain.registries import METRICS
from moetrain.settings import ObserveSettings
from moetrain.train.micro_batch import MicroBatch


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Figures of one step over the global batch, equal on all ranks."""

    loss: float
    """What was minimised, a mean over valid tokens: cross-entropy, balance and z losses."""
    cross_entropy: float
    load_balance_loss: float
    """Mean over the MoE layers of the balance loss, of the scope that is minimised; 1 when
    balanced."""
    z_loss: float
    entropy: float
    """Mean entropy of the routers' distributions, in nats."""
    expert_counts: Tensor
    """Token–expert assignments of each expert, [MoE layers, experts] float64."""
    grad_norm: float
    """Of all gradients, before clipping."""
    num_tokens: int
    skipped: bool
    """Whether loss or gradients were not finite, or no token counted: no weight changed."""
    head_z_loss: float | None = None
    """Mean squared log-sum-exp of the head's logits; None where it has no weight in the loss."""
    clip_factor: float | None = None
    """What gradients were multiplied by: 1 where they weren't clipped; None without clipping."""
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    """Gradient norms before clipping by the parameters' role."""
    source_nats: tuple[float, ...] = ()
    """Cross-entropy summed over the tokens of each source."""
    data_counts: tuple[int, ...] = ()
    """Each rank's counts of its part of the batch, summed over ranks."""
    metric_sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Sums of the metrics over the global batch, by the metric's name; each [n] float64."""


class Metric(ABC):
    """Additional figures of a step in a record.

    It is called for the steps that are recorded, on every rank. Its sums over tokens are exact in
    every layout and with any micro-batches. It has no state between steps: a resumed run writes the
    same records.
    """

    def __init__(self, options: Any = None) -> None:
        self.options = options
        """Its options: an object of the dataclass it is registered with."""

    def sums(self, output: LossSums, batch: MicroBatch, model: Transformer) -> Tensor | None:
        """Returns sums over a micro-batch's valid tokens, [n], always of one length; None: none.

        Called without gradients, after the forward pass.
        """
        return None

    @abstractmethod
    def values(self, sums: Tensor, report: StepReport, model: Transformer) -> Mapping[str, Any]:
        """Returns numbers by their names in the record: `my_lab/gate_entropy`.

        `sums` [n] float64 are over the global batch. Called on every rank, so that it may use
        collectives; the parameters of `model` are sharded.
        """


def build_metrics(settings: ObserveSettings) -> dict[str, Metric]:
    """Returns the metrics that the settings name, by name."""
    given = settings.metric_options
    return {
        name: METRICS.get(name).made(METRICS.typed_options(name, given.get(name, {})))
        for name in settings.metrics
    }
