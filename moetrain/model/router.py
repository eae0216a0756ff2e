"""The router: which experts a token goes to, with what weight, and how balanced that is.

Everything here is float32 whatever the model's dtype: rounding a near-tie to bfloat16 would route
a token differently.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from moetrain.model.choice import Choice
from moetrain.model.losses import load_balance_loss
from moetrain.registries import ROUTERS
from moetrain.settings.model import ModelSettings


class RoutingStatistics(NamedTuple):
    """Sums over one forward pass's valid tokens, from which the balance losses are computed."""

    counts: Tensor
    """Token–expert assignments of each expert, [experts] int64."""
    probability_sums: Tensor
    """Router probability summed over tokens, [experts]; carries the gradient. A token's
    probabilities sum to one, with sigmoid too (DeepSeek-V3, arXiv 2412.19437, equation 19)."""
    z_sum: Tensor
    """Squared log-sum-exp of the logits summed over tokens, []; carries the gradient."""
    entropy_sum: Tensor
    """Entropy of the router's distribution summed over tokens, [] nats, no gradient."""
    sequence_balance_sum: Tensor
    """Each sequence's balance loss times its tokens, summed over sequences, []; carries the
    gradient. Zero unless `load_balance_scope` is sequence."""
    own_loss_sum: Tensor
    """The router's own loss summed over tokens, []; carries the gradient. Zero for a router
    without one."""


class Routing(NamedTuple):
    """Where the tokens go."""

    experts: Tensor
    """The experts that each token chose, [tokens, top_k] int64, global ids."""
    gates: Tensor
    """Their weights, [tokens, top_k] float32."""
    statistics: RoutingStatistics


TINY = 1e-20  # keeps scores that all underflow to zero from making 0 / 0


def balanced_scores(
    num_tokens: int, num_experts: int, *, device: torch.device
) -> Float[Tensor, "tokens experts"]:
    """Returns pseudo-random scores whose top k spread tokens evenly, for any k.

    Each block of `num_experts` consecutive tokens shares a random permutation of the experts, and
    each token in it starts one further along, so that all experts are chosen equally often and a
    token's experts are at random distances. It is the same for every sequence.
    """
    blocks = -(-num_tokens // num_experts)
    generator = torch.Generator(device=device).manual_seed(0)
    drawn = torch.rand(blocks, 1, num_experts, device=device, generator=generator)
    order = drawn.argsort(-1)  # [blocks, 1, experts], a permutation each
    start = torch.arange(num_experts, device=device).unsqueeze(1)
    scores = -((order - start) % num_experts)  # [blocks, experts, experts]
    return scores.flatten(0, 1)[:num_tokens].float()


@ROUTERS.register("top_k")
class Router(nn.Module):
    """Scores every expert for every token, of which each token takes its top k.

    Softmax (arXiv 2401.04088, 2.1) or sigmoid (arXiv 2412.19437, equations 12-16); of all experts
    or of the experts in a token's best groups. The bias moves the choice, never the gates
    (arXiv 2408.15664).

    A router of an extension inherits from it and replaces one of its parts: `logits`, `scores`,
    `selection_scores`, `select`, `gates`, `own_loss` or `update_bias`. All are float32. A token's
    values must not depend on other tokens, because which tokens are on the same rank differs
    between layouts.
    """

    draws_noise = False
    """Whether it needs a seed for each sequence of a training pass, in `choice.noise_seeds`."""
    bias: Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.options = ROUTERS.typed_options(settings.router.name, settings.router.options)
        """Its options: an object of the dataclass it is registered with, or None."""
        self.top_k = settings.top_k
        self.num_experts = settings.num_experts
        self.settings = settings.router
        self.weight = nn.Parameter(torch.empty(settings.num_experts, settings.dim))
        self.register_buffer("bias", torch.zeros(settings.num_experts, dtype=torch.float32))

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        valid: Bool[Tensor, "*sequences seq"],
        choice: Choice | None = None,
    ) -> Routing:
        """Routes every token; only valid ones count in the statistics.

        `valid` has a sequence's tokens in its last dimension; flattened, it has one value per row
        of x. `choice` is passed with the batch: without it there is no jitter.
        """
        choice = choice or Choice(0)
        sequences = torch.atleast_2d(valid)  # [sequences, seq]
        with torch.autocast(x.device.type, enabled=False):
            x = self._jittered(x.float(), sequences, choice.noise_seeds)
            logits = self.logits(x, choice)
            scores, probabilities = self.scores(logits)
            if self.settings.force_balance:
                by = balanced_scores(sequences.shape[1], self.num_experts, device=x.device)
                by = by.repeat(len(sequences), 1)
            else:
                by = self.selection_scores(logits, scores).detach()
            experts = choice.experts(by, self.select)
            gates = self.gates(logits, scores, experts)
            statistics = self._statistics(logits, probabilities, experts, sequences)
            return Routing(experts, gates, statistics)

    def logits(
        self, x: Float[Tensor, "tokens dim"], choice: Choice
    ) -> Float[Tensor, "tokens experts"]:
        """Returns the logits of the layer's input tokens, from which the scores are computed."""
        return F.linear(x, self.weight.float())

    def scores(
        self, logits: Float[Tensor, "tokens experts"]
    ) -> tuple[Float[Tensor, "tokens experts"], Float[Tensor, "tokens experts"]]:
        """Returns scores, from which gates are computed, and probabilities, which sum to one."""
        if self.settings.score_function == "softmax":
            probabilities = logits.softmax(-1)
            return probabilities, probabilities
        scores = logits.sigmoid()
        return scores, scores / (scores.sum(-1, keepdim=True) + TINY)

    def _jittered(self, x: Tensor, sequences: Tensor, seeds: Sequence[int] | None) -> Tensor:
        """Multiplies the router's input by noise in a training pass, as Switch does.

        A sequence's noise depends only on its seed, so that it is the same in every layout, in a
        resumed run and under recomputation.
        """
        noise = self.settings.jitter_noise
        if not noise or seeds is None:
            return x
        assert len(seeds) == len(sequences), "one seed for each sequence"
        factors = torch.empty(*sequences.shape, x.shape[-1], device=x.device)
        for part, seed in zip(factors, seeds, strict=True):
            generator = torch.Generator(device=x.device).manual_seed(seed)
            part.uniform_(1 - noise, 1 + noise, generator=generator)
        return x * factors.flatten(0, 1)

    def selection_scores(
        self, logits: Float[Tensor, "tokens experts"], scores: Float[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        """Returns the scores by which experts are chosen; no gradient goes through them."""
        if self.settings.score_function == "softmax":
            # The logits have the same order and don't underflow; a bias is added to probabilities.
            # A trained bias stays in use even if its update rate is set to 0.
            return torch.where(self.bias.any(), scores + self.bias, logits)
        return scores + self.bias

    def select(self, scores: Float[Tensor, "tokens experts"]) -> Int64[Tensor, "tokens top_k"]:
        """Returns the experts that tokens choose, given their selection scores."""
        if self.settings.num_groups > 1 and not self.settings.force_balance:
            scores = self._in_best_groups(scores)
        return torch.topk(scores, self.top_k, dim=-1).indices

    def _in_best_groups(self, scores: Tensor) -> Tensor:
        """Masks the scores of all but each token's best groups with -inf."""
        grouped = scores.unflatten(-1, (self.settings.num_groups, -1))  # [tokens, groups, experts]
        best = 1 if self.settings.score_function == "softmax" else min(2, grouped.shape[-1])
        group_scores = grouped.topk(best, dim=-1).values.sum(-1)  # [tokens, groups]
        chosen = group_scores.topk(self.settings.top_groups, dim=-1).indices
        out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
        left: Tensor = grouped.masked_fill(out.unsqueeze(-1), -torch.inf).flatten(1)
        return left

    def gates(
        self,
        logits: Float[Tensor, "tokens experts"],
        scores: Float[Tensor, "tokens experts"],
        experts: Int64[Tensor, "tokens top_k"],
    ) -> Float[Tensor, "tokens top_k"]:
        """Returns the gates of the chosen experts: from the scores, without the bias."""
        if self.settings.normalize_gates and self.settings.score_function == "softmax":
            gates = logits.gather(1, experts).softmax(-1)  # equal, without a division
        else:
            gates = scores.gather(1, experts)
            if self.settings.normalize_gates:
                gates = gates / (gates.sum(-1, keepdim=True) + TINY)
        factor = self.settings.routed_scaling_factor
        return gates if factor == 1.0 else gates * factor

    def own_loss(
        self, logits: Float[Tensor, "tokens experts"], experts: Int64[Tensor, "tokens top_k"]
    ) -> Float[Tensor, " tokens"] | None:
        """Returns a loss per token, times its weight, besides balance and z loss; None: no loss.

        Its mean over the global batch's tokens, summed over layers, is added to the step's loss.
        """
        return None

    def _statistics(
        self, logits: Tensor, probabilities: Tensor, experts: Tensor, sequences: Tensor
    ) -> RoutingStatistics:
        weight = sequences.flatten().float()
        valid = sequences.flatten().long().unsqueeze(1).expand_as(experts).reshape(-1)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=experts.device)
        counts.scatter_add_(0, experts.reshape(-1), valid)
        z = torch.logsumexp(logits, -1).square()
        with torch.no_grad():
            entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1)
        balance = torch.zeros((), device=logits.device)
        if self.settings.load_balance_scope == "sequence":
            balance = self._sequence_balance_sum(probabilities, experts, sequences)
        own = self.own_loss(logits, experts)
        return RoutingStatistics(
            counts,
            weight @ probabilities,
            weight @ z,
            weight @ entropy,
            balance,
            torch.zeros((), device=logits.device) if own is None else weight @ own,
        )

    def _sequence_balance_sum(
        self, probabilities: Tensor, experts: Tensor, sequences: Tensor
    ) -> Tensor:
        weight = sequences.float()
        chosen = experts.view(len(sequences), -1)  # [sequences, seq * top_k]
        valid = sequences.long().repeat_interleave(self.top_k, dim=1)
        counts = torch.zeros(
            len(sequences), self.num_experts, dtype=torch.int64, device=experts.device
        ).scatter_add_(1, chosen, valid)
        probabilities = probabilities.view(*sequences.shape, self.num_experts)
        losses = load_balance_loss(
            counts,
            torch.bmm(weight.unsqueeze(1), probabilities).squeeze(1),  # [sequences, experts]
            top_k=self.top_k,
            counted_tokens=weight.sum(1, keepdim=True).clamp_min(1),  # an empty one adds 0
            num_tokens=1,
        )  # each times its sequence's tokens
        return losses.sum()

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "Router":
        """Keeps the selection bias in float32 through `.to(dtype)` of the whole model."""
        exact = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype != torch.float32:
            self.bias = exact.to(self.bias.device)
        return self

    @torch.no_grad()
    def update_bias(self, counts: Int64[Tensor, " experts"], *, rate: float) -> None:
        """Moves the bias by `rate` in favour of experts that got less than their share."""
        load = counts.float()
        self.bias += rate * (load.mean() - load).sign()


def build_router(settings: ModelSettings) -> Router:
    """Returns the router that the settings name."""
    router: Router = ROUTERS.get(settings.router.name).made(settings)
    return router
