"""One optimizer step over a global batch, the same on every layout."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from moetrain.device_copies import to_device
from moetrain.model import LossSums, Transformer, load_balance_loss
from moetrain.optim import set_learning_rate
from moetrain.parallel import TOKEN_AXES, WEIGHT_AXES, Gradients, Meshes
from moetrain.train.micro_batch import MicroBatch, Schedule, one_after_another
from moetrain.train.objective import Objective, Pretraining, local_balance_sums
from moetrain.train.step_report import Metric, StepReport

PRETRAINING = Pretraining()
NO_METRICS: Mapping[str, Metric] = {}


def train_step(
    micro_batches: Sequence[MicroBatch],
    *,
    model: Transformer,
    optimizer: Optimizer,
    gradients: Gradients,
    meshes: Meshes,
    learning_rate: float,
    objective: Objective = PRETRAINING,
    schedule: Schedule = one_after_another,
    data_counts: Sequence[int] = (),
    num_sources: int = 0,
    metrics: Mapping[str, Metric] = NO_METRICS,
    begin_micro_batch: Callable[[bool], None] = lambda last: None,
    begin: Callable[[str], None] = lambda phase: None,
    before_update: Callable[[], None] = lambda: None,
) -> StepReport:
    """Takes one step; every rank calls it with its part of the same global batch.

    `data_counts` has the same length on every rank, and `metrics` are the same. With `num_sources`
    cross-entropy is summed by the sources of the micro-batches.
    `begin_micro_batch` is called before each, with whether it is the last; `begin` with the name of
    each phase of the step; `before_update` before the optimizer changes the weights.
    """
    begin("counting tokens")
    valid = torch.stack([batch.valid.sum() for batch in micro_batches]).sum()
    counted = meshes.sum(valid, over=TOKEN_AXES)
    num_tokens = counted.clamp_min(1)  # zero if all documents of a batch are corrupted
    loss_of = objective.begin(micro_batches, model=model, meshes=meshes, num_tokens=num_tokens)
    sums = _Sums(
        model,
        device=num_tokens.device,
        data_counts=data_counts,
        num_sources=num_sources,
        metrics=metrics,
    )

    def forward(batch: MicroBatch) -> Tensor:
        begin("forward")
        begin_micro_batch(batch is micro_batches[-1])
        output = batch.through(model)
        loss = loss_of(output, batch)
        sums.add(loss, output, batch, model=model)
        return loss

    def backward(loss: Tensor) -> None:
        begin("backward")
        loss.backward()

    schedule(micro_batches, forward, backward)
    begin("summing up")
    report = sums.report(model=model, meshes=meshes, num_tokens=counted, gradients=gradients)
    gradients.clip(report.grad_norm)
    begin("optimizer")
    if not report.skipped:
        set_learning_rate(optimizer, learning_rate)
        before_update()
        optimizer.step()
        _update_router_biases(model, report.expert_counts)
    optimizer.zero_grad()
    return report


@torch.no_grad()
def _update_router_biases(model: Transformer, expert_counts: Tensor) -> None:
    rate, layers = model.settings.router.bias_update_rate, model.moe_layers()
    if rate and layers:
        on_device = to_device(expert_counts, layers[0].router.bias.device)
        for layer, counts in zip(layers, on_device, strict=True):
            layer.router.update_bias(counts, rate=rate)


SCALARS = 5  # loss, cross-entropy, z, entropy, balance; then z of the head, if it has a z-loss


class _Sums:
    """Running sums of a step's figures on this rank, reduced over ranks once at the end."""

    def __init__(
        self,
        model: Transformer,
        *,
        device: torch.device,
        data_counts: Sequence[int],
        num_sources: int,
        metrics: Mapping[str, Metric],
    ) -> None:
        self._metrics = metrics
        self._num_sources = num_sources
        self._by_sequence: list[tuple[Tensor, Tensor]] = []
        """Each micro-batch's sources and cross-entropies, [sequences]."""
        self._of_metrics: dict[str, Tensor] = {}
        self._data_counts = to_device(torch.tensor(data_counts, dtype=torch.float64), device)
        self._shape = (model.settings.num_moe_layers, model.settings.num_experts)
        self._num_scalars = SCALARS + (model.settings.head_z_loss_weight > 0)
        # The scalars, as below; then counts and probabilities of every expert.
        self._sums = torch.zeros(
            self._num_scalars + 2 * math.prod(self._shape), dtype=torch.float64, device=device
        )

    @torch.no_grad()
    def add(self, loss: Tensor, output: LossSums, batch: MicroBatch, *, model: Transformer) -> None:
        routing = output.routing
        scalars = (
            loss,
            output.cross_entropy,
            routing.z_sum.sum(),
            routing.entropy_sum.sum(),
            local_balance_sums(output, batch, model=model).sum(),
            *(() if output.head_z_sum is None else (output.head_z_sum,)),
        )
        self._sums += torch.cat(
            (
                torch.stack([s.double() for s in scalars]),
                routing.counts.flatten().double(),
                routing.probability_sums.flatten().double(),
            )
        )
        if self._num_sources and batch.sources is not None and output.by_sequence is not None:
            self._by_sequence.append((batch.sources, output.by_sequence))
        for name, metric in self._metrics.items():
            if (found := metric.sums(output, batch, model)) is not None:
                before = self._of_metrics.get(name, 0)
                self._of_metrics[name] = before + found.flatten().to(self._sums)

    def _nats_by_source(self) -> Tensor:
        """Returns the cross-entropy of each source's sequences, [sources]."""
        if not self._by_sequence:
            return self._sums.new_zeros(self._num_sources)
        sources, nats = (torch.cat(tensors) for tensors in zip(*self._by_sequence, strict=True))
        numbers = torch.arange(self._num_sources, device=sources.device)
        return torch.where(sources == numbers.unsqueeze(1), nats, 0.0).sum(1)

    def report(
        self, *, model: Transformer, meshes: Meshes, num_tokens: Tensor, gradients: Gradients
    ) -> StepReport:
        # The end of a step: one collective, and one wait for the device. Counts are exact: float64
        # holds integers up to 2**53.
        own = list(self._of_metrics.values())
        of_tokens = torch.cat((self._data_counts, self._sums, *own))
        sums, squares, squares_by_role, nats = meshes.sum_together(
            (of_tokens, TOKEN_AXES),
            (gradients.square_sum(), WEIGHT_AXES),
            (gradients.square_sums_by_role(), WEIGHT_AXES),
            (self._nats_by_source(), TOKEN_AXES),
        )
        parts = (squares, squares_by_role, nats, num_tokens.double().view(1), sums)
        ends = torch.cat(parts).cpu()  # the wait
        squares, squares_by_role, nats, counted, sums = ends.split([len(part) for part in parts])
        grad_norm, num_counted = squares.sqrt().item(), int(counted.item())
        sizes = [len(self._data_counts), len(self._sums), *map(len, own)]
        data_counts, sums, *own = sums.split(sizes)
        layers, experts = self._shape
        tokens = max(1, num_counted)
        scalars, of_experts = sums[: self._num_scalars].tolist(), sums[self._num_scalars :]
        loss, cross_entropy, z, entropy, balance, *head_z = scalars
        counts, probabilities = of_experts.view(2, layers, experts)
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
            head_z_loss=head_z[0] / tokens if head_z else None,
            entropy=entropy * per_layer,
            expert_counts=counts,
            grad_norm=grad_norm,
            clip_factor=(gradients.clip_factor(grad_norm) or 1.0) if gradients.clips else None,
            grad_norms=dict(zip(gradients.roles, squares_by_role.sqrt().tolist(), strict=True)),
            source_nats=tuple(nats.tolist()),
            num_tokens=num_counted,
            skipped=not (num_counted and math.isfinite(loss) and math.isfinite(grad_norm)),
            data_counts=tuple(int(count) for count in data_counts.tolist()),
            metric_sums=dict(zip(self._of_metrics, own, strict=True)),
        )
