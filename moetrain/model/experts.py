"""Feed-forward layers, with SwiGLU (arXiv 2002.05202) or another function: dense, or experts."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moetrain.kernels import Assignments, ExpertFunction, compute_experts, expert_function
from moetrain.model.choice import Memo
from moetrain.model.token_exchange import TokenExchange
from moetrain.settings.model import ModelSettings


class FeedForward(nn.Module):
    """A dense layer: that of a block without a router, or the shared experts of an MoE layer."""

    def __init__(self, dim: int, hidden: int, *, function: ExpertFunction) -> None:
        super().__init__()
        self.function = function
        self.gate_proj = nn.Linear(dim, hidden, bias=False) if function.gated else None
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Returns down(f(up(x), gate(x)))."""
        gate = None if self.gate_proj is None else self.gate_proj(x)
        y: Tensor = self.down_proj(self.function(self.up_proj(x), gate))
        return y


class Experts(nn.Module):
    """The experts on this rank.

    Each weight is [experts, hidden, dim], so that one matrix belongs to one expert and can be
    sharded along the hidden dimension.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        shape = (settings.num_experts, settings.ffn_hidden_dim, settings.dim)
        self.settings = settings.experts
        self.function = expert_function(settings.experts)
        self.preferred_backend: str | None = None
        """The backend that `auto` takes if it serves the shape; the same on all ranks."""
        self.gate = nn.Parameter(torch.empty(shape)) if self.function.gated else None
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(shape))

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        experts: Int64[Tensor, "tokens top_k"],
        gates: Float[Tensor, "tokens top_k"],
        *,
        exchange: TokenExchange,
        memo: Memo | None = None,
        beside: Callable[[], Tensor] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Runs `exchange` with these experts and returns its output; no token is dropped.

        The exchange is called inside this module, not around it, so that FSDP gathers the weights
        once, however many rounds the exchange takes.
        """
        gate = None if self.gate is None else _local(self.gate)
        up, down = _local(self.up), _local(self.down)

        def compute(rows: Tensor, gates: Tensor, assignments: Assignments) -> Tensor:
            return compute_experts(
                rows,
                gates,
                assignments,
                gate,
                up,
                down,
                function=self.function,
                backend=self.settings.backend,
                preferred=self.preferred_backend,
                recompute=self.settings.recompute,
            )

        return exchange.run(x, experts, gates, compute=compute, memo=memo, beside=beside)


def _local(weight: Tensor) -> Tensor:
    # Under expert parallelism the parameter is a distributed tensor: take this rank's experts.
    return weight.to_local() if hasattr(weight, "to_local") else weight
