"""Causal grouped-query attention with rotary positions, over torch's fused kernel."""

from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moetrain.model.documents import Documents, attend_documents
from moetrain.model.key_value_exchange import KeyValueExchange, LocalKeyValues
from moetrain.model.rotary import rotate
from moetrain.settings.model import ModelSettings


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) without biases.

    `exchange` decides where the rest of a sequence is. With `qk_norm`, queries and keys are
    normalised before they are split into heads, as in OLMoE (arXiv 2409.02060, section 4.2.5).
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.head_dim = settings.head_dim
        self.num_heads = settings.num_heads
        self.num_kv_heads = settings.num_kv_heads
        query_dim = settings.num_heads * settings.head_dim
        kv_dim = settings.num_kv_heads * settings.head_dim
        self.q_proj = nn.Linear(settings.dim, query_dim, bias=False)
        self.k_proj = nn.Linear(settings.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(settings.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, settings.dim, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(dim, eps=settings.norm_eps) if settings.qk_norm else nn.Identity()
            for dim in (query_dim, kv_dim)
        )
        self.exchange: KeyValueExchange = LocalKeyValues()

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        rotary: tuple[Float[Tensor, "*rows seq head_dim"], Float[Tensor, "*rows seq head_dim"]],
        documents: Documents | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Lets each position attend to itself and earlier ones, of its document if given."""
        batch, seq, _ = x.shape
        heads = (batch, seq, -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x)).view(heads).transpose(1, 2), *rotary)
        k = rotate(self.k_norm(self.k_proj(x)).view(heads).transpose(1, 2), *rotary)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # [batch, kv_heads, seq, head_dim]
        y = self.exchange.run(q, k, v, attend=partial(attend, documents=documents))
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, seq, -1))
        return out


def attend(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
    *,
    documents: Documents | None,
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Returns causal attention, within documents if they are given."""
    grouped = k.shape[1] != q.shape[1]
    if grouped and q.device.type == "cpu":
        # With enable_gqa the CPU falls back to the unfused kernel and its full score matrix.
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        grouped = False
    if documents is not None:
        return attend_documents(q, k, v, documents)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
