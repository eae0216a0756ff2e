"""What a model costs, from its settings alone: parameters and FLOPs."""

from moetrain.model.settings import ModelSettings


def _parameters(settings: ModelSettings, *, experts: int) -> int:
    dim, heads = settings.dim, settings.num_heads * settings.head_dim
    kv = settings.num_kv_heads * settings.head_dim
    attention = 2 * dim * heads + 2 * dim * kv
    router = settings.num_experts * dim if settings.is_moe else 0
    feed_forward = experts * 3 * dim * settings.ffn_hidden_dim
    layer = attention + router + feed_forward + 2 * dim
    return settings.num_layers * layer + 2 * settings.vocab_size * dim + dim


def total_parameters(settings: ModelSettings) -> int:
    """Returns the number of parameters, all experts counted."""
    return _parameters(settings, experts=settings.num_experts)


def active_parameters(settings: ModelSettings) -> int:
    """Returns the number of parameters that one token meets: `top_k` experts a layer."""
    return _parameters(settings, experts=settings.top_k)


def training_flops_per_token(settings: ModelSettings, *, seq_len: int) -> float:
    """Returns the FLOPs of one token's forward and backward pass.

    Six for each active parameter of a matrix product (the embedding is a look-up), and the
    causal attention's scores and sums: 12 · heads · head_dim · seq_len / 2 a layer
    (arXiv 2204.02311, appendix B, halved for the causal mask). Recomputation is not counted.
    """
    matrices = active_parameters(settings) - settings.vocab_size * settings.dim
    attention = 6 * settings.num_layers * settings.num_heads * settings.head_dim * seq_len
    return 6.0 * matrices + attention
