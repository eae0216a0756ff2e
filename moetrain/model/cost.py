"""What a model costs, from its settings alone: parameters, FLOPs, kept activations."""

import torch

from moetrain.kernels import expert_function
from moetrain.model.router import build_router
from moetrain.settings.model import ModelSettings


def _parameters(settings: ModelSettings, *, routed_experts: int) -> int:
    dim, heads = settings.dim, settings.num_heads * settings.head_dim
    kv = settings.num_kv_heads * settings.head_dim
    attention = 2 * dim * heads + 2 * dim * kv + settings.attention_bias * (heads + 2 * kv)
    attention += settings.attention_output_bias * dim
    if settings.qk_norm:
        attention += 2 * settings.head_dim if settings.qk_norm_scope == "head" else heads + kv
    feed_forward = 0
    matrices = 3 if expert_function(settings.experts).gated else 2
    for layer in range(settings.num_layers):
        hidden = settings.dense_hidden_dim(layer)
        if hidden is None:
            feed_forward += _router_parameters(settings)
            hidden = (routed_experts + settings.num_shared_experts) * settings.ffn_hidden_dim
        feed_forward += matrices * dim * hidden
    layers = settings.num_layers * (attention + 2 * dim) + feed_forward
    return layers + embedding_parameters(settings) + dim


def embedding_parameters(settings: ModelSettings) -> int:
    """Returns the number of parameters of embedding and head, which may be the same."""
    return (1 if settings.tie_embeddings else 2) * settings.vocab_size * settings.dim


def _router_parameters(settings: ModelSettings) -> int:
    if settings.router.name == "top_k":
        return settings.num_experts * settings.dim
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_router(settings).parameters())


def total_parameters(settings: ModelSettings) -> int:
    """Returns the number of parameters, all experts counted."""
    return _parameters(settings, routed_experts=settings.num_experts)


def active_parameters(settings: ModelSettings) -> int:
    """Returns the active parameters: those of one token's `top_k` and shared experts per layer."""
    return _parameters(settings, routed_experts=settings.top_k)


def training_flops_per_token(settings: ModelSettings, *, seq_len: int) -> float:
    """Returns the FLOPs of one token's forward and backward pass.

    Six per active parameter of a matrix product (the embedding is a look-up), and causal
    attention's scores and sums: 12 · heads · head_dim · seq_len / 2 per layer (arXiv 2204.02311,
    appendix B, halved for the causal mask). Recomputation is not counted. Attention counts as over
    whole sequences, even where it stops at document ends and costs less.
    """
    head = settings.vocab_size * settings.dim
    matrices = active_parameters(settings) - embedding_parameters(settings) + head
    attention = 6 * settings.num_layers * settings.num_heads * settings.head_dim * seq_len
    return 6.0 * matrices + attention


def kept_activations(
    settings: ModelSettings, *, tokens: int, width: int, composed_norm: bool, sent_rows: int = 0
) -> list[float]:
    """Returns the bytes of activations that each layer keeps for the backward pass.

    For so many tokens, with numbers of `width` bytes and without recomputation of whole layers. It
    follows what the modules save. `composed_norm` is torch's RMSNorm on a CPU, which keeps its
    input, the normalised input and its output, where a fused one keeps input and output. On a CPU
    also, keys and values are repeated for each query head, and the experts keep no copies of their
    rows. `sent_rows` are the rows that a token has on other ranks of the expert axis.
    """
    dim, queries = settings.dim, settings.num_heads * settings.head_dim
    kv = settings.num_kv_heads * settings.head_dim
    of_norm = 3 if composed_norm else 2
    attention = 4 * queries if composed_norm else 2 * (queries + kv)
    attention += settings.qk_norm * (of_norm - 1) * (queries + kv)
    attention += (settings.clip_qkv is not None) * (queries + 2 * kv)  # what clamp takes in
    outside = width * (2 * of_norm * dim + attention) + 4 * settings.num_heads
    kept = []
    for layer in range(settings.num_layers):
        hidden = settings.dense_hidden_dim(layer)
        if hidden is None:
            inside = _kept_by_experts(settings, width=width, on_cpu=composed_norm)
            inside += width * dim * sent_rows
        else:
            inside = width * 4 * hidden
        kept.append(float(tokens * (outside + inside)))
    return kept


def _kept_by_experts(settings: ModelSettings, *, width: int, on_cpu: bool) -> int:
    """Returns the bytes that a layer's router and experts keep per token."""
    numbers = 4 * settings.num_shared_experts * settings.ffn_hidden_dim
    if not settings.experts.recompute:
        of_copy = 2 * settings.ffn_hidden_dim  # the outputs of the gate and up matrices
        of_copy += 0 if on_cpu else settings.ffn_hidden_dim + 2 * settings.dim
        numbers += settings.top_k * of_copy
    router = 8 * settings.num_experts + 24 * settings.top_k  # float32 values and expert indices
    router += 0 if width == 4 else 4 * settings.dim
    return width * numbers + router


def head_activations(settings: ModelSettings, *, tokens: int, width: int, norm: int) -> float:
    """Returns the bytes of the final norm and of the loss, which holds a chunk of the logits."""
    chunk = min(tokens, settings.loss_chunk) * settings.vocab_size
    weights = settings.vocab_size * settings.dim  # the head's gradient, accumulated in float32
    return tokens * width * settings.dim * (norm + 1) + chunk * (8 + width % 4) + 8.0 * weights
