"""transformers' Mixtral and Mistral as oracles: the same shape, and their weights copied over."""

import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from moetrain.model import ModelSettings, Transformer

NAMES = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
PARTS = {
    "self_attn": "attention",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.gate.weight": "feed_forward.router.weight",
    "mlp": "feed_forward",
}


def oracle_for(settings: ModelSettings) -> nn.Module:
    """Returns transformers' model of the same shape, its weights drawn from torch's generator."""
    shape = {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.dim,
        "intermediate_size": settings.ffn_hidden_dim,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.head_dim,
        "rms_norm_eps": settings.norm_eps,
        "max_position_embeddings": settings.max_seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if not settings.is_moe:
        return MistralForCausalLM(MistralConfig(**shape)).eval()
    config = MixtralConfig(
        **shape, num_local_experts=settings.num_experts, num_experts_per_tok=settings.top_k
    )
    model = MixtralForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("gate.weight"):  # a spread that makes the choice of experts matter
            nn.init.normal_(weight)
    return model


@torch.no_grad()
def copy_weights(oracle: nn.Module, model: Transformer) -> None:
    """Copies every weight of the oracle; a weight left over on either side is an error."""
    weights = {}
    for name, weight in oracle.named_parameters():
        ours = NAMES.get(name, name.removeprefix("model."))
        for theirs, part in PARTS.items():
            ours = ours.replace(f".{theirs}", f".{part}")
        if ours.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, dim=1)
            stem = ours.removesuffix("gate_up_proj")
            weights[f"{stem}gate"], weights[f"{stem}up"] = gate, up
        elif ours.endswith("experts.down_proj"):
            weights[ours.removesuffix("_proj")] = weight.transpose(1, 2)
        else:
            weights[ours] = weight
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("router.bias") for name in missing)
