"""transformers' models as oracles: the same shape, and their weights copied over.

Mistral for a dense model, OLMoE for one with query and key norms, GLM-4.5 for DeepSeek-V3's router
with shared experts and dense first layers (DeepSeek's own attention is another), else Mixtral.
"""

import torch
from torch import nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from moetrain.model import Transformer
from moetrain.settings import ModelSettings

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
    "mlp.gate.e_score_correction_bias": "feed_forward.router.bias",
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
        "pad_token_id": None,  # OLMoE's own gets no embedding
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    model: nn.Module
    if not settings.is_moe:
        model = MistralForCausalLM(MistralConfig(**shape))
        return model.eval()
    shape["num_experts_per_tok"] = settings.top_k
    router = settings.router
    if settings.qk_norm:
        model = OlmoeForCausalLM(
            OlmoeConfig(
                **shape, num_experts=settings.num_experts, norm_topk_prob=router.normalize_gates
            )
        )
    elif settings.num_shared_experts:
        model = Glm4MoeForCausalLM(
            Glm4MoeConfig(
                **shape | {"intermediate_size": settings.dense_ffn_hidden_dim},
                partial_rotary_factor=1.0,
                moe_intermediate_size=settings.ffn_hidden_dim,
                n_shared_experts=settings.num_shared_experts,
                n_routed_experts=settings.num_experts,
                routed_scaling_factor=router.routed_scaling_factor,
                n_group=router.num_groups,
                topk_group=router.top_groups,
                first_k_dense_replace=settings.num_dense_layers,
                norm_topk_prob=router.normalize_gates,
                num_mtp_layers=0,
            )
        )
    else:
        model = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=settings.num_experts))
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("gate.weight"):  # a spread that makes the choice of experts matter
            nn.init.normal_(weight)
        elif name.endswith("e_score_correction_bias"):
            nn.init.normal_(weight, std=0.2)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.uniform_(weight, 0.5, 2.0)
    return model.eval()


@torch.no_grad()
def copy_weights(oracle: nn.Module, model: Transformer) -> None:
    """Copies every weight of the oracle; a weight left over on either side is an error."""
    weights = {}
    buffers = [b for b in oracle.named_buffers() if b[0].endswith("e_score_correction_bias")]
    for name, weight in [*oracle.named_parameters(), *buffers]:
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
