"""One optimizer step over a global batch, the same on every layout."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from data_pipeline import Batch
from moetrain.model import Documents, LossSums, Transformer, load_balance_loss
from moetrain.parallel import Gradients, sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What a rank takes through the model at once; all [sequences, seq_len]."""

    tokens: Tensor
    targets: Tensor
    valid: Tensor
    """Bool: which targets count."""
    noise_seeds: Sequence[int] | None = None
    """One for each sequence, for the routers' jitter; None: no jitter."""
    documents: Documents | None = None
    """What attention stops at the ends of; None: it crosses them."""

    @staticmethod
    def cut(
        batch: Batch,
        size: int,
        *,
        device: torch.device,
        mask_documents: bool = False,
        noise_seeds: Sequence[int] | None = None,
    ) -> "list[MicroBatch]":
        """Returns a rank's slice of a batch in pieces of `size` sequences, on the device."""
        starts = torch.from_numpy(batch.document_starts).split(size)
        arrays = (batch.tokens, batch.targets, batch.loss_mask)
        pieces = zip(*(torch.from_numpy(a).to(device).split(size) for a in arrays), strict=True)
        return [
            MicroBatch(
                tokens=x,
                targets=y,
                valid=mask,
                noise_seeds=noise_seeds and noise_seeds[number * size : (number + 1) * size],
                documents=Documents.of(starts[number], device=device) if mask_documents else None,
            )
            for number, (x, y, mask) in enumerate(pieces)
        ]

    def through(self, model: Transformer) -> LossSums:
        """Returns what one forward pass of the model makes of it."""
        sums: LossSums = model(
            self.tokens, self.targets, self.valid, self.noise_seeds, self.documents
        )
        return sums


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
    """Token copies that each expert got, [MoE layers, experts] float64."""
    grad_norm: float
    num_tokens: int
    skipped: bool
    """Whether loss or gradients were not finite, or no token counted: the weights were left."""
    data_counts: tuple[int, ...] = ()
    """What each rank counted in its part of the batch, summed over ranks."""


def train_step(
    micro_batches: Sequence[MicroBatch],
    *,
    model: Transformer,
    optimizer: Optimizer,
    gradients: Gradients,
    learning_rate: float,
    data_counts: Sequence[int] = (),
    begin: Callable[[str], None] = lambda phase: None,
) -> StepReport:
    """Takes one step; every rank calls it with its part of the same global batch.

    `data_counts` are as many on every rank. `begin` is told of each part of the step.
    """
    begin("counting tokens")
    counted = sum_over_ranks(torch.stack([b.valid.sum() for b in micro_batches]).sum())
    num_tokens = counted.clamp_min(1)  # none count where all documents of a batch are damaged
    counts = _expert_counts_ahead(micro_batches, model)
    sums = _Sums(model, device=num_tokens.device, data_counts=data_counts)
    for batch in micro_batches:
        begin("forward")
        output = batch.through(model)
        loss = _objective(output, batch, model=model, num_tokens=num_tokens, counts=counts)
        begin("backward")
        loss.backward()
        sums.add(loss, output, batch, model=model)
    begin("summing up")
    norm = gradients.clip()
    report = sums.report(model=model, num_tokens=counted, grad_norm=norm)
    begin("optimizer")
    if not report.skipped:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        _update_router_biases(model, report.expert_counts)
    optimizer.zero_grad()
    return report


def _expert_counts_ahead(batches: Sequence[MicroBatch], model: Transformer) -> Tensor | None:
    """Returns the global batch's expert counts where the first backward pass needs them early.

    The balance loss weighs every token's probabilities with the counts of the *whole* batch. With
    several micro-batches those of the later ones aren't known at the first backward pass, so
    that the loss would depend on how the batch was cut: a pass without gradients counts first.
    """
    router = model.settings.router
    wanted = model.settings.is_moe and router.load_balance_loss_weight > 0
    if not wanted or router.load_balance_scope != "global_batch" or len(batches) == 1:
        return None
    with torch.no_grad():
        counts = [batch.through(model).routing.counts for batch in batches]
    return sum_over_ranks(torch.stack(counts).sum(0))


def _objective(
    output: LossSums,
    batch: MicroBatch,
    *,
    model: Transformer,
    num_tokens: Tensor,
    counts: Tensor | None,
) -> Tensor:
    """Returns this micro-batch's part of the loss: all parts add up to the global batch's."""
    router, routing = model.settings.router, output.routing
    loss = output.cross_entropy / num_tokens
    if not model.settings.is_moe:
        return loss
    if router.load_balance_loss_weight:
        if router.load_balance_scope == "global_batch":
            balance = load_balance_loss(
                sum_over_ranks(routing.counts) if counts is None else counts,
                routing.probability_sums,
                top_k=model.settings.top_k,
                counted_tokens=num_tokens,
                num_tokens=num_tokens,
            )
        else:
            balance = _local_balance_sums(output, batch, model=model) / num_tokens
        loss = loss + router.load_balance_loss_weight * balance.sum()
    return loss + router.z_loss_weight * routing.z_sum.sum() / num_tokens


def _local_balance_sums(output: LossSums, batch: MicroBatch, *, model: Transformer) -> Tensor:
    """Returns each MoE layer's balance loss of the micro-batch, or of its sequences, [layers].

    Each is multiplied by its tokens, so that sums over ranks and micro-batches divided by all
    tokens are a mean. Zeros where the scope is the global batch, whose loss isn't a sum of such.
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


@torch.no_grad()
def _update_router_biases(model: Transformer, expert_counts: Tensor) -> None:
    if rate := model.settings.router.bias_update_rate:
        for layer, counts in zip(model.moe_layers(), expert_counts, strict=True):
            layer.router.update_bias(counts.to(layer.router.bias.device), rate=rate)


SCALARS = 5  # loss, cross-entropy, z, entropy, balance


class _Sums:
    """Running sums of a step's figures on this rank, summed over ranks once at the end."""

    def __init__(
        self, model: Transformer, *, device: torch.device, data_counts: Sequence[int]
    ) -> None:
        self._data_counts = torch.tensor(data_counts, dtype=torch.float64, device=device)
        self._shape = (model.settings.num_moe_layers, model.settings.num_experts)
        # Scalars as below; then counts and probabilities of every expert.
        self._sums = torch.zeros(
            SCALARS + 2 * math.prod(self._shape), dtype=torch.float64, device=device
        )

    @torch.no_grad()
    def add(self, loss: Tensor, output: LossSums, batch: MicroBatch, *, model: Transformer) -> None:
        routing = output.routing
        scalars = (
            loss,
            output.cross_entropy,
            routing.z_sum.sum(),
            routing.entropy_sum.sum(),
            _local_balance_sums(output, batch, model=model).sum(),
        )
        self._sums += torch.cat(
            (
                torch.stack([s.double() for s in scalars]),
                routing.counts.flatten().double(),
                routing.probability_sums.flatten().double(),
            )
        )

    def report(self, *, model: Transformer, num_tokens: Tensor, grad_norm: float) -> StepReport:
        # Counts are exact: float64 holds integers up to 2**53.
        sums = sum_over_ranks(torch.cat((self._data_counts, self._sums))).cpu()
        data_counts, sums = sums.tensor_split([len(self._data_counts)])
        num_counted, (layers, experts) = int(num_tokens.item()), self._shape
        tokens = max(1, num_counted)
        loss, cross_entropy, z, entropy, balance = sums[:SCALARS].tolist()
        counts, probabilities = sums[SCALARS:].view(2, layers, experts)
        if model.settings.router.load_balance_scope == "global_batch":
            balance = tokens * load_balance_loss(
                counts,
                probabilities,
                top_k=model.settings.top_k,
                counted_tokens=tokens,
                num_tokens=tokens,
            ).sum().item()  # fmt: skip
        per_layer = 1 / (tokens * max(1, layers))
        return StepReport(
            loss=loss,
            cross_entropy=cross_entropy / tokens,
            load_balance_loss=balance * per_layer,
            z_loss=z * per_layer,
            entropy=entropy * per_layer,
            expert_counts=counts,
            grad_norm=grad_norm,
            num_tokens=num_counted,
            skipped=not (num_counted and math.isfinite(loss) and math.isfinite(grad_norm)),
            data_counts=tuple(int(count) for count in data_counts.tolist()),
        )
