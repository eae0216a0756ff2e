"""SwiGLU feed-forward layers (arXiv 2002.05202): one, or a stack of experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moetrain.kernels import Copies, expert_swiglu
from moetrain.model.token_exchange import TokenExchange
from moetrain.settings.model import ModelSettings


class FeedForward(nn.Module):
    """A dense SwiGLU layer: of a block without a router, or the shared experts of one with."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Returns down(silu(gate(x)) * up(x))."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Experts(nn.Module):
    """The SwiGLU experts that live on this rank.

    Each weight is [experts, hidden, dim], so that one matrix belongs to one expert and the
    hidden dimension can be sharded under it.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        shape = (settings.num_experts, settings.ffn_hidden_dim, settings.dim)
        self.settings = settings.experts
        self.gate = nn.Parameter(torch.empty(shape))
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(shape))

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        experts: Int64[Tensor, "tokens top_k"],
        gates: Float[Tensor, "tokens top_k"],
        *,
        exchange: TokenExchange,
        beside: Callable[[], Tensor] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Returns what `exchange` makes of the tokens with these experts; none is dropped.

        The exchange happens in here, not around it, so that the weights are gathered once however
        many rounds the tokens come in.
        """
        weights = [_local(weight) for weight in (self.gate, self.up, self.down)]

        def compute(rows: Tensor, gates: Tensor, copies: Copies) -> Tensor:
            return expert_swiglu(
                rows,
                gates,
                copies,
                *weights,
                backend=self.settings.backend,
                recompute=self.settings.recompute,
            )

        return exchange.run(x, experts, gates, compute=compute, beside=beside)


def _local(weight: Tensor) -> Tensor:
    # Under expert parallelism the parameter is a distributed tensor: take this rank's experts.
    return weight.to_local() if hasattr(weight, "to_local") else weight
