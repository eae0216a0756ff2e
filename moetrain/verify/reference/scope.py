"""What the reference can't compute, each named by its setting: it refuses rather than guesses."""

import dataclasses
from typing import Any

from moetrain.settings import Config

# The settings that the reference computes, whatever their value. A setting that is in none of
# these sets and differs from its default is one that the reference has never heard of.
MODEL = {
    "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_dim", "num_experts",
    "top_k", "vocab_size", "max_seq_len", "rope_theta", "norm_eps", "pad_vocab_to_multiple_of",
    "num_shared_experts", "num_dense_layers", "dense_ffn_hidden_dim", "loss_chunk_size",
    "router", "experts", "qk_norm", "qk_norm_scope", "clip_qkv", "attention_bias",
    "attention_output_bias",
    "tie_embeddings", "partial_rotary_factor", "rope_scaling", "init",
    "logit_soft_cap", "head_z_loss_weight",
}  # fmt: skip
ROUTER = {
    "score_function", "normalize_gates", "routed_scaling_factor", "num_groups", "top_groups",
    "load_balance_loss_weight", "load_balance_scope", "z_loss_weight", "bias_update_rate",
    "jitter_noise",
}  # fmt: skip
INIT = {
    "std", "truncate_at", "residual_scale", "embedding_std", "head_std", "router_std",
}  # fmt: skip
EXPERTS = {"backend", "recompute"}
OPTIM = {"lr", "weight_decay", "betas", "eps", "momentum", "clip_grad_norm", "restart_from"}
CHOICES = {
    "model.experts.function": ("swiglu",),
    "model.router.name": ("top_k",),
    "optim.name": ("adamw", "sgd"),
    "train.objective": ("pretraining",),
}
"""Settings of which the reference computes some values."""


def unknown_settings(config: Config) -> list[str]:
    """Returns what the reference can't compute as `setting=value`; empty if it can compute all."""
    model, found = config.model, []
    groups: tuple[tuple[str, Any, set[str]], ...] = (
        ("model", model, MODEL),
        ("model.router", model.router, ROUTER),
        ("model.init", model.init, INIT),
        ("model.experts", model.experts, EXPERTS),
        ("optim", config.optim, OPTIM),
    )
    for prefix, settings, known in groups:
        for field in dataclasses.fields(settings):
            name = f"{prefix}.{field.name}"
            value = getattr(settings, field.name)
            if field.name in known or value in CHOICES.get(name, ()) or value == _default(field):
                continue
            found.append(f"{name}={value}")
    if config.train.objective not in CHOICES["train.objective"]:
        found.append(f"train.objective={config.train.objective}")
    return found


def _default(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
