"""SwiGLU feed-forward layers (arXiv 2002.05202): one, or a stack of experts."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moetrain.kernels import grouped_matmul
from moetrain.model.settings import ModelSettings


class FeedForward(nn.Module):
    """The dense SwiGLU layer of a model without a router."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        dim, hidden = settings.dim, settings.ffn_hidden_dim
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Returns down(silu(gate(x)) * up(x))."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Experts(nn.Module):
    """The SwiGLU experts that live on this rank, over rows grouped by expert.

    Each weight is [experts, hidden, dim], so that one matrix belongs to one expert and the
    hidden dimension can be sharded under it.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        shape = (settings.num_experts, settings.ffn_hidden_dim, settings.dim)
        self.backend = settings.experts.backend
        self.gate = nn.Parameter(torch.empty(shape))
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(shape))

    def forward(
        self, rows: Float[Tensor, "rows dim"], counts: Int64[Tensor, " local_experts"]
    ) -> Float[Tensor, "rows dim"]:
        """Applies to each row the expert it is grouped under; no row is dropped or padded."""
        gate, up, down = map(_local, (self.gate, self.up, self.down))
        hidden = F.silu(self._matmul(rows, gate.transpose(1, 2), counts))
        hidden = hidden * self._matmul(rows, up.transpose(1, 2), counts)
        return self._matmul(hidden, down, counts)

    def _matmul(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        return grouped_matmul(rows, weights, counts, backend=self.backend)


def _local(weight: Tensor) -> Tensor:
    # Under expert parallelism the parameter is a distributed tensor: take this rank's experts.
    return weight.to_local() if hasattr(weight, "to_local") else weight
