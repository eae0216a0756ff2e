"""The rules between the settings of a model; ConfigError names the setting and a way out."""

from moetrain.checks import ConfigError
from moetrain.model import rotary_dim
from moetrain.parallel import divisors
from moetrain.settings import ModelSettings


def check_model(model: ModelSettings) -> None:
    """Raises ConfigError for an invalid model."""
    _check_layers(model)
    _check_groups(model)
    _check_attention(model)
    _check_rope_scaling(model)
    if model.tie_embeddings and model.init.head_std is not None:
        raise ConfigError(
            "model.init.head_std",
            model.init.head_std,
            "the head is the embedding, with model.tie_embeddings=true: use "
            "model.init.embedding_std",
        )
    if model.top_k > model.num_experts == 1:
        raise ConfigError(
            "model.num_experts",
            1,
            f"is a dense model, and model.top_k={model.top_k}: add model.top_k=1",
        )
    if model.top_k > model.num_experts:
        raise ConfigError(
            "model.top_k",
            model.top_k,
            f"a token can't choose more experts than there are: use at most "
            f"model.num_experts={model.num_experts}",
        )
    if model.is_moe and model.top_k == 1 and model.router.normalize_gates:
        raise ConfigError(
            "model.router.normalize_gates",
            True,
            "with model.top_k=1 the only gate is always 1, so that the router would learn "
            "nothing from the loss: use false, or a larger top_k",
        )


def check_backend(model: ModelSettings, *, dtype: str) -> None:
    """Raises ConfigError for a function or sizes that the experts' backend can't compute."""
    if model.experts.backend == "megablocks" and model.experts.function != "swiglu":
        raise ConfigError(
            "model.experts.backend",
            "megablocks",
            f"its kernels compute swiglu, not {model.experts.function}: use auto",
        )
    multiple = 4 if dtype == "float32" else 8  # torch's grouped product: whole 16 bytes
    if model.is_moe and model.experts.backend == "grouped_mm":
        for name in ("dim", "ffn_hidden_dim"):
            if (size := getattr(model, name)) % multiple:
                raise ConfigError(
                    f"model.{name}",
                    size,
                    f"model.experts.backend=grouped_mm needs a multiple of {multiple}: use "
                    f"{-(-size // multiple) * multiple}, or model.experts.backend=auto",
                )


def _check_layers(model: ModelSettings) -> None:
    """Raises ConfigError for dense layers and shared experts that the model can't have."""
    if not model.is_moe:
        for name in ("num_dense_layers", "num_shared_experts"):
            if value := getattr(model, name):
                raise ConfigError(
                    f"model.{name}",
                    value,
                    "with model.num_experts=1 every layer is dense, of model.ffn_hidden_dim: use 0",
                )
    elif model.num_dense_layers >= model.num_layers:
        raise ConfigError(
            "model.num_dense_layers",
            model.num_dense_layers,
            f"leaves none of model.num_layers={model.num_layers} to the experts: use at most "
            f"{model.num_layers - 1}, or model.num_experts=1 for a dense model",
        )
    if model.num_dense_layers and model.dense_ffn_hidden_dim is None:
        raise ConfigError(
            "model.dense_ffn_hidden_dim",
            None,
            f"model.num_dense_layers={model.num_dense_layers} need a hidden dimension of their "
            f"own: use a number, such as {model.ffn_hidden_dim * model.top_k}, with which a token "
            "meets as many parameters as in top_k experts",
        )
    if model.dense_ffn_hidden_dim is not None and not model.num_dense_layers:
        raise ConfigError(
            "model.dense_ffn_hidden_dim",
            model.dense_ffn_hidden_dim,
            "is of the first layers that have no router, and there are none: use null, or a "
            "model.num_dense_layers of 1 or more",
        )


def _check_groups(model: ModelSettings) -> None:
    """Raises ConfigError for groups of experts that a token can't choose its top k from."""
    router, experts = model.router, model.num_experts
    if experts % router.num_groups:
        raise ConfigError(
            "model.router.num_groups",
            router.num_groups,
            f"does not divide model.num_experts={experts}: use one of {divisors(experts)}",
        )
    if router.top_groups > router.num_groups:
        raise ConfigError(
            "model.router.top_groups",
            router.top_groups,
            f"a token can't choose more groups than there are: use at most "
            f"model.router.num_groups={router.num_groups}",
        )
    size = experts // router.num_groups
    if model.top_k <= experts and router.top_groups * size < model.top_k:
        raise ConfigError(
            "model.router.top_groups",
            router.top_groups,
            f"groups of {size} experts hold {router.top_groups * size}, fewer than "
            f"model.top_k={model.top_k}: use at least {-(-model.top_k // size)}",
        )


def _check_attention(model: ModelSettings) -> None:
    """Raises ConfigError for heads that can't be shared, normalised or rotated."""
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            "model.num_kv_heads",
            model.num_kv_heads,
            f"must divide model.num_heads={model.num_heads}: use one of "
            f"{divisors(model.num_heads)}",
        )
    if model.head_dim % 2:
        raise ConfigError(
            "model.head_dim",
            model.head_dim,
            f"must be even, for rotary positions turn pairs: use {model.head_dim + 1}",
        )
    rotated = rotary_dim(model)
    if not rotated or rotated % 2:
        raise ConfigError(
            "model.partial_rotary_factor",
            model.partial_rotary_factor,
            f"rotates {rotated} of model.head_dim={model.head_dim} dimensions, which must be an "
            f"even number from 2 on: use {max(2, rotated + rotated % 2) / model.head_dim:g}",
        )
    if model.qk_norm_scope != "whole" and not model.qk_norm:
        raise ConfigError(
            "model.qk_norm_scope",
            model.qk_norm_scope,
            "there is no norm, with model.qk_norm=false: add model.qk_norm=true",
        )


def _check_rope_scaling(model: ModelSettings) -> None:
    """Raises ConfigError for a scaling of positions that lacks what it is computed from."""
    scaling = model.rope_scaling
    if scaling.type == "none" and scaling.factor != 1.0:
        raise ConfigError(
            "model.rope_scaling.factor",
            scaling.factor,
            "nothing is scaled, with model.rope_scaling.type=none: add a type, such as yarn",
        )
    if scaling.type in ("llama3", "yarn") and scaling.original_max_seq_len is None:
        raise ConfigError(
            "model.rope_scaling.original_max_seq_len",
            None,
            f"model.rope_scaling.type={scaling.type} needs the length that the model was trained "
            f"on before, such as {max(1, int(model.max_seq_len / scaling.factor))}",
        )
    if scaling.type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ConfigError(
            "model.rope_scaling.high_freq_factor",
            scaling.high_freq_factor,
            f"must be more than model.rope_scaling.low_freq_factor={scaling.low_freq_factor:g}",
        )
