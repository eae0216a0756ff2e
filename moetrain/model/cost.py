"""What a model costs, from its settings alone: parameters and FLOPs."""

from moetrain.model.settings import ModelSettings


def _parameters(settings: ModelSettings, *, routed_experts: int) -> int:
    dim, heads = settings.dim, settings.num_heads * settings.head_dim
    kv = settings.num_kv_heads * settings.head_dim
    attention = 2 * dim * heads + 2 * dim * kv + settings.qk_norm * (heads + kv)
    feed_forward = 0
    for layer in range(settings.num_layers):
        hidden = settings.dense_hidden_dim(layer)
        if hidden is None:
            feed_forward += settings.num_experts * dim  # the router
            hidden = (routed_experts + settings.num_shared_experts) * settings.ffn_hidden_dim
        feed_forward += 3 * dim * hidden
    layers = settings.num_layers * (attention + 2 * dim) + feed_forward
    return layers + 2 * settings.vocab_size * dim + dim


def total_parameters(settings: ModelSettings) -> int:
    """Returns the number of parameters, all experts counted."""
    return _parameters(settings, routed_experts=settings.num_experts)


def active_parameters(settings: ModelSettings) -> int:
    """Returns the parameters that one token meets: `top_k` and the shared experts of a layer."""
    return _parameters(settings, routed_experts=settings.top_k)


def training_flops_per_token(settings: ModelSettings, *, seq_len: int) -> float:
    """Returns the FLOPs of one token's forward and backward pass.

    Six for each active parameter of a matrix product (the embedding is a look-up), and the
    causal attention's scores and sums: 12 · heads · head_dim · seq_len / 2 a layer
    (arXiv 2204.02311, appendix B, halved for the causal mask). Recomputation is not counted.
    Attention counts as over whole sequences, also where it stops at document ends and costs less.
    """
    matrices = active_parameters(settings) - settings.vocab_size * settings.dim
    attention = 6 * settings.num_layers * settings.num_heads * settings.head_dim * seq_len
    return 6.0 * matrices + attention
