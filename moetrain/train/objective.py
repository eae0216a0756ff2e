"""What a step minimises, computed from the sums of a forward pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moetrain.model import LossSums, Transformer, load_balance_loss
from moetrain.parallel import TOKEN_AXES, Meshes
from moetrain.registries import OBJECTIVES
from moetrain.settings import TrainSettings
from moetrain.train.micro_batch import MicroBatch

Loss = Callable[[LossSums, MicroBatch], Tensor]
"""A micro-batch's part of the loss, []: the parts of all ranks add up to the global batch's."""


class Objective(ABC):
    """What training minimises."""

    def __init__(self, options: Any = None) -> None:
        self.options = options
        """Its options: an object of the dataclass it is registered with."""

    @abstractmethod
    def begin(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        model: Transformer,
        meshes: Meshes,
        num_tokens: Tensor,
    ) -> Loss:
        """Returns the loss of a step's micro-batches; all ranks call it.

        `num_tokens` is the number of the global batch's valid tokens, at least 1.
        """


@OBJECTIVES.register("pretraining")
class Pretraining(Objective):
    """Cross-entropy of the next token, and the balance and z losses of routers and head."""

    def begin(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        model: Transformer,
        meshes: Meshes,
        num_tokens: Tensor,
    ) -> Loss:
        """Returns the loss, once the balance loss's counts of the global batch are known."""
        router, top_k = model.settings.router, model.settings.top_k
        is_moe = model.settings.is_moe
        counts = expert_counts_ahead(micro_batches, model, meshes)

        def loss(output: LossSums, batch: MicroBatch) -> Tensor:
            routing, value = output.routing, output.token_loss / num_tokens
            if not is_moe:
                return value
            if router.load_balance_loss_weight:
                if router.load_balance_scope == "global_batch":
                    balance = load_balance_loss(
                        meshes.sum(routing.counts, over=TOKEN_AXES) if counts is None else counts,
                        routing.probability_sums,
                        top_k=top_k,
                        counted_tokens=num_tokens,
                        num_tokens=num_tokens,
                    )
                else:
                    balance = local_balance_sums(output, batch, model=model) / num_tokens
                value = value + router.load_balance_loss_weight * balance.sum()
            value = value + router.z_loss_weight * routing.z_sum.sum() / num_tokens
            return value + routing.own_loss_sum.sum() / num_tokens

        return loss


def build_objective(settings: TrainSettings) -> Objective:
    """Returns the objective that the settings name."""
    name, options = settings.objective, settings.objective_options
    objective: Objective = OBJECTIVES.get(name).made(OBJECTIVES.typed_options(name, options))
    return objective


def expert_counts_ahead(
    batches: Sequence[MicroBatch], model: Transformer, meshes: Meshes
) -> Tensor | None:
    """Returns the global batch's expert counts where the first backward pass needs them early.

    The balance loss weights every token's probabilities by the counts of the *whole* batch. With
    several micro-batches, the counts of the later ones aren't known at the first backward pass, and
    the loss would depend on how the batch is split: so a pass without gradients counts first.
    """
    router = model.settings.router
    wanted = model.settings.is_moe and router.load_balance_loss_weight > 0
    if not wanted or router.load_balance_scope != "global_batch" or len(batches) == 1:
        return None
    with torch.no_grad():
        counts = [batch.through(model).routing.counts for batch in batches]
    return meshes.sum(torch.stack(counts).sum(0), over=TOKEN_AXES)


def local_balance_sums(output: LossSums, batch: MicroBatch, *, model: Transformer) -> Tensor:
    """Returns each MoE layer's balance loss of the micro-batch, or of its sequences, [layers].

    Each is multiplied by its tokens, so that sums over ranks and micro-batches divided by all
    tokens are a mean. Zeros where the scope is the global batch, whose loss isn't such a sum.
    """
    routing, scope = output.routing, model.settings.router.load_balance_scope
    if scope == "micro_batch":
        return load_balance_loss(
            routing.counts,
            routing.probability_sums,
            top_k=model.settings.top_k,
            counted_tokens=batch.valid.sum().clamp_min(1),
            num_tokens=1,
        )
    return routing.sequence_balance_sum
