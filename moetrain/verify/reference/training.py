"""The reference's step: losses of the global batch, gradients, one norm, clipping, one update."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline import Batch
from moetrain.settings import ModelSettings, OptimSettings, RouterSettings
from moetrain.verify.reference.decoder import Routed, Sequence, losses
from moetrain.verify.reference.optimizers import Optimizer
from moetrain.verify.reference.weights import Weights, initial_weights, stream, zero_biases

Watch = Callable[[int, int, Tensor, Tensor], Tensor]
"""(sequence, layer, scores, own choice) → the choice to take."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step found. Weights move only if `skipped` is false."""

    figures: dict[str, Tensor]
    """Under the names of a step's report."""
    gradients: Weights
    """Before clipping."""
    gradient_norm: float


class Reference:
    """A model, its optimizer and its steps. Not for long runs: it is slow."""

    def __init__(
        self, model: ModelSettings, optim: OptimSettings, *, seed: int, mask_documents: bool
    ) -> None:
        self.model, self.seed, self.mask_documents = model, seed, mask_documents
        self.max_norm = optim.clip_grad_norm
        self.weights = initial_weights(model, seed)
        self.biases = zero_biases(model)
        self.optimizer = Optimizer(optim)

    def step(
        self,
        batch: Batch,
        *,
        first_sample: int,
        lr: float,
        skipped: bool = False,
        micro_batch_size: int | None = None,
        watch: Watch = lambda _, __, ___, own: own,
    ) -> Step:
        """Takes a step over a global batch; a skipped one leaves weights, state and bias alone.

        `micro_batch_size` is that of the balance loss over micro-batches; None: the whole batch.
        """
        sequences = self._sequences(batch, first_sample)
        num_tokens = max(1.0, sum(float(s.valid.sum()) for s in sequences))
        chosen: dict[tuple[int, int], Tensor] = {}

        def choose_first(number: int, layer: int, scores: Tensor, own: Tensor) -> Tensor:
            chosen[number, layer] = watch(number, layer, scores, own)
            return chosen[number, layer]

        with torch.no_grad():  # the balance loss of any token needs the counts of all
            counts = [self._counts(s, number, choose_first) for number, s in enumerate(sequences)]
        for weight in self.weights.values():
            weight.requires_grad_(True)
        sums = _Sums(self.model, num_tokens)
        for number, sequence in enumerate(sequences):
            cross_entropy, head_z, routed = losses(
                *(self.weights, self.biases, self.model, sequence),
                lambda layer, _, __, number=number: chosen[number, layer],  # type: ignore[misc]
            )
            size = micro_batch_size or len(sequences)
            begin = number // size * size
            part = range(begin, begin + size)
            balance = [
                self._balance(
                    layer, sums_of_layer, sequences=sequences, counts=counts, number=number,
                    part=part, num_tokens=num_tokens,
                )
                for layer, sums_of_layer in enumerate(routed)
            ]  # fmt: skip
            sums.add(cross_entropy, head_z, routed, balance).backward()
        gradients = {
            name: torch.zeros_like(w) if w.grad is None else w.grad
            for name, w in self.weights.items()
        }
        for weight in self.weights.values():
            weight.requires_grad_(False).grad = None
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        counted = torch.stack([torch.stack(c) for c in counts]).sum(0) if counts[0] else None
        figures = sums.figures(counted)
        if not skipped:
            self._update(gradients, norm, counted, lr=lr)
        return Step(figures=figures, gradients=gradients, gradient_norm=norm)

    @torch.no_grad()
    def _update(self, gradients: Weights, norm: float, counts: Tensor | None, *, lr: float) -> None:
        factor = 1.0
        if self.max_norm is not None and norm > self.max_norm:
            factor = self.max_norm / norm
        self.optimizer.step(self.weights, {n: g * factor for n, g in gradients.items()}, lr)
        if counts is None:
            return
        for bias, load in zip(self.biases.values(), counts, strict=True):
            # Up for an expert with less than its share, down for one with more.
            bias += self.model.router.bias_update_rate * torch.sign(load.mean() - load)

    def _balance(
        self,
        layer: int,
        sums: Routed,
        *,
        sequences: list[Sequence],
        counts: list[list[Tensor]],
        number: int,
        part: range,
        num_tokens: float,
    ) -> Tensor:
        """Returns a sequence's part of a layer's balance loss: experts · sum of share · chance.

        The shares of assignments are those of the scope: the sequence's, the micro-batch's or the
        global batch's.
        """
        scope = self.model.router.load_balance_scope
        members = {
            "sequence": range(number, number + 1),
            "micro_batch": part,
            "global_batch": range(len(sequences)),
        }[scope]
        counted = torch.stack([counts[member][layer] for member in members]).sum(0)
        tokens = max(1.0, sum(float(sequences[member].valid.sum()) for member in members))
        share = counted / (tokens * self.model.top_k)
        return self.model.num_experts * (share * sums.probabilities).sum() / num_tokens

    def _counts(self, sequence: Sequence, number: int, choose: Watch) -> list[Tensor]:
        _, _, routed = losses(
            *(self.weights, self.biases, self.model, sequence),
            lambda layer, scores, own: choose(number, layer, scores, own),
        )
        return [sums.counts for sums in routed]

    def _sequences(self, batch: Batch, first_sample: int) -> list[Sequence]:
        jitters = self.model.router.jitter_noise > 0
        found = []
        for number in range(len(batch.tokens)):
            starts = torch.from_numpy(batch.document_starts[number])
            found.append(
                Sequence(
                    tokens=torch.from_numpy(batch.tokens[number]).long(),
                    targets=torch.from_numpy(batch.targets[number]).long(),
                    valid=torch.from_numpy(batch.loss_mask[number]).double(),
                    documents=starts.long().cumsum(0) if self.mask_documents else None,
                    noise_seed=(
                        stream(self.seed, "sample", first_sample + number) if jitters else None
                    ),
                )
            )
        return found


class _Sums:
    """The losses, added up sequence by sequence."""

    def __init__(self, model: ModelSettings, num_tokens: float) -> None:
        self.router: RouterSettings = model.router
        self.head_weight = model.head_z_loss_weight
        self.layers = max(1, model.num_moe_layers)
        self.num_tokens = num_tokens
        names = ("loss", "cross_entropy", "load_balance_loss", "z_loss", "head_z_loss")
        self.totals = dict.fromkeys(names, 0.0)
        self.entropy = 0.0

    def add(
        self, cross_entropy: Tensor, head_z: Tensor, routed: list[Routed], balance: list[Tensor]
    ) -> Tensor:
        """Returns a sequence's part of the loss."""
        head_z = head_z / self.num_tokens
        cross_entropy = cross_entropy / self.num_tokens
        loss, z = cross_entropy, torch.zeros((), dtype=torch.float64)
        total = sum(balance, torch.zeros((), dtype=torch.float64))
        for sums in routed:
            z = z + sums.z / self.num_tokens
            self.entropy += float(sums.entropy) / self.num_tokens / self.layers
        loss = loss + self.router.load_balance_loss_weight * total + self.router.z_loss_weight * z
        loss = loss + self.head_weight * head_z
        for name, value in (
            ("loss", loss),
            ("cross_entropy", cross_entropy),
            ("load_balance_loss", total / self.layers),
            ("z_loss", z / self.layers),
            ("head_z_loss", head_z),
        ):
            self.totals[name] += float(value.detach())
        return loss

    def figures(self, counts: Tensor | None) -> dict[str, Tensor]:
        """Returns the figures under the names of a step's report."""
        values = {**self.totals, "entropy": self.entropy, "num_tokens": self.num_tokens}
        found = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        return found if counts is None else found | {"expert_counts": counts}
