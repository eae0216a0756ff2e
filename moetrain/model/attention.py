"""Causal grouped-query attention with rotary positions, over torch's fused kernel."""

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from moetrain.kernels.attention import fused_attention
from moetrain.model.documents import Documents, attend_documents
from moetrain.model.key_value_exchange import KeyValueExchange, LocalKeyValues
from moetrain.model.rotary import rotate
from moetrain.settings.model import ModelSettings


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245).

    `exchange` decides where the rest of a sequence is. With `qk_norm`, queries and keys are
    normalised before they are split into heads, as in OLMoE (arXiv 2409.02060, section 4.2.5), or
    each head by itself, as in Qwen3 (arXiv 2505.09388).
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.head_dim = settings.head_dim
        self.num_heads = settings.num_heads
        self.num_kv_heads = settings.num_kv_heads
        query_dim = settings.num_heads * settings.head_dim
        kv_dim = settings.num_kv_heads * settings.head_dim
        bias = settings.attention_bias
        self.q_proj = nn.Linear(settings.dim, query_dim, bias=bias)
        self.k_proj = nn.Linear(settings.dim, kv_dim, bias=bias)
        self.v_proj = nn.Linear(settings.dim, kv_dim, bias=bias)
        self.o_proj = nn.Linear(query_dim, settings.dim, bias=settings.attention_output_bias)
        self.norm_per_head = settings.qk_norm_scope == "head"
        self.clip = settings.clip_qkv
        self.q_norm, self.k_norm = (
            nn.RMSNorm(self.head_dim if self.norm_per_head else dim, eps=settings.norm_eps)
            if settings.qk_norm
            else nn.Identity()
            for dim in (query_dim, kv_dim)
        )
        self.exchange: KeyValueExchange = LocalKeyValues()
        named = settings.attention_kernel
        self.kernel: str | None = None if named == "auto" else named
        """The kernel of a GPU that it takes if that serves the shape; the same on all ranks."""

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        rotary: tuple[Float[Tensor, "*rows seq rotary_dim"], Float[Tensor, "*rows seq rotary_dim"]],
        documents: Documents | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Lets each position attend to itself and earlier ones, of its document if given."""
        batch, seq, _ = x.shape
        q = rotate(self._heads(self.q_proj(x), self.q_norm), *rotary)
        k = rotate(self._heads(self.k_proj(x), self.k_norm), *rotary)
        v = self._heads(self.v_proj(x))
        y = self.exchange.run(
            q, k, v, attend=partial(attend, documents=documents, kernel=self.kernel)
        )
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, seq, -1))
        return out

    def _heads(
        self, x: Float[Tensor, "batch seq width"], norm: nn.Module | None = None
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """Splits into heads, normalised and clipped as the settings say."""
        heads = (*x.shape[:2], -1, self.head_dim)
        if norm is not None:
            x = norm(x.view(heads)) if self.norm_per_head else norm(x)
        if self.clip is not None:
            x = x.clamp(-self.clip, self.clip)
        return x.view(heads).transpose(1, 2)


def attend(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
    *,
    documents: Documents | None,
    kernel: str | None = None,
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Returns causal attention, within documents if they are given."""
    if documents is not None:
        return attend_documents(q, k, v, documents, kernel=kernel)
    return fused_attention(q, k, v, kernel=kernel)
