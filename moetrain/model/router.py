"""The router: which experts a token goes to, with what weight, and how balanced that is.

Everything here is float32 whatever the model's dtype: a near-tie rounded to bfloat16 sends
a token elsewhere.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from moetrain.model.settings import ModelSettings


class RoutingStatistics(NamedTuple):
    """Sums over one forward pass's valid tokens: what the balance losses are made of."""

    counts: Tensor
    """Token copies that chose each expert, [experts] int64."""
    probability_sums: Tensor
    """Router probability summed over tokens, [experts]; carries the gradient."""
    z_sum: Tensor
    """Squared log-sum-exp of the logits summed over tokens, []; carries the gradient."""
    entropy_sum: Tensor
    """Entropy of the router's distribution summed over tokens, [] nats, no gradient."""


class Routing(NamedTuple):
    """Where the tokens go."""

    experts: Tensor
    """The experts that each token chose, [tokens, top_k] int64, global ids."""
    gates: Tensor
    """Their weights, [tokens, top_k] float32."""
    statistics: RoutingStatistics


class Router(nn.Module):
    """A softmax over the experts, of which each token takes its top k (arXiv 2401.04088, 2.1)."""

    bias: Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.top_k = settings.top_k
        self.num_experts = settings.num_experts
        self.normalize_gates = settings.router.normalize_gates
        self.select: Callable[[Tensor], Tensor] = self._top_k
        """Scores to chosen experts; replaced where a choice is replayed instead of made again."""
        self.weight = nn.Parameter(torch.empty(settings.num_experts, settings.dim))
        self.is_biased = settings.router.bias_update_rate > 0
        # Moves the choice, never the gates (arXiv 2408.15664); all zeros unless it is trained.
        self.register_buffer("bias", torch.zeros(settings.num_experts, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "tokens dim"], valid: Bool[Tensor, " tokens"]) -> Routing:
        """Routes every token; only valid ones count in the statistics."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # [tokens, experts]
            probabilities = logits.softmax(-1)
            scores = probabilities + self.bias if self.is_biased else logits  # of the same order
            experts = self.select(scores.detach())
            if self.normalize_gates:  # a softmax over the chosen logits, with no division
                gates = logits.gather(1, experts).softmax(-1)
            else:
                gates = probabilities.gather(1, experts)
            return Routing(experts, gates, self._statistics(logits, probabilities, experts, valid))

    def _top_k(self, scores: Float[Tensor, "tokens experts"]) -> Int64[Tensor, "tokens top_k"]:
        return torch.topk(scores, self.top_k, dim=-1).indices

    def _statistics(
        self, logits: Tensor, probabilities: Tensor, experts: Tensor, valid: Tensor
    ) -> RoutingStatistics:
        weight = valid.float()
        copies = valid.long().unsqueeze(1).expand_as(experts).reshape(-1)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=experts.device)
        counts.scatter_add_(0, experts.reshape(-1), copies)
        z = torch.logsumexp(logits, -1).square()
        with torch.no_grad():
            entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1)
        return RoutingStatistics(counts, weight @ probabilities, weight @ z, weight @ entropy)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "Router":
        """Keeps the selection bias in float32 through `.to(dtype)` of the whole model."""
        exact = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype != torch.float32:
            self.bias = exact.to(self.bias.device)
        return self

    @torch.no_grad()
    def update_bias(self, counts: Int64[Tensor, " experts"], *, rate: float) -> None:
        """Moves the bias by `rate` towards experts that got less than their share of the batch."""
        load = counts.float()
        self.bias += rate * (load.mean() - load).sign()
