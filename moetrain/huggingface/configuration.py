"""A model's settings as a Hugging Face config.json, and back.

Owns what config.json says besides rotary positions (`rope.py`), and what can't be carried. Leaves
which class computes a model to `families.py`, and the tensors to `names.py`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from moetrain.checks import ConfigError
from moetrain.huggingface.balance import read_router, router_json
from moetrain.huggingface.families import (
    FAMILIES,
    GLM4_MOE,
    QWEN2_MOE,
    QWEN3_MOE,
    Family,
    family_named,
    family_of,
)
from moetrain.huggingface.names import ConversionError
from moetrain.huggingface.rope import read_rope, rope_json
from moetrain.settings import ModelSettings
from moetrain.settings.validation import validated

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The keys that are read from a config.json besides those of its family.
_READ = {
    "model_type", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "sliding_window", "hidden_act", "layer_types",
    "intermediate_size", "attention_bias", "mlp_bias", "attention_dropout", "auto_map",
    "quantization_config", "router_aux_loss_coef", "router_jitter_noise", "output_router_logits",
    "mlp_only_layers", "decoder_sparse_step", "shared_expert_intermediate_size",
    "num_nextn_predict_layers", "use_sliding_window", "max_window_layers", "num_local_experts",
}  # fmt: skip
# Keys that don't describe the model: who wrote it, how it is loaded, what a call returns.
_MEANINGLESS = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path",
    "initializer_range", "output_attentions", "output_hidden_states", "return_dict",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "chunk_size_feed_forward", "id2label", "label2id", "torchscript", "pretraining_tp",
    "_commit_hash", "experts_implementation",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """The model of a config.json, as settings of this project."""

    settings: ModelSettings
    family: Family
    extra_layers: int
    """Layers in its files beyond those of the model, which predict tokens further ahead."""
    carried: list[str]
    """Settings that were converted to another name or scale."""
    notes: list[str]
    """Differences from the original model that a user should know."""
    token_ids: dict[str, Any]
    """Its special tokens, for an export without a tokenizer."""


def config_json(
    settings: ModelSettings,
    *,
    dtype: str,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
) -> dict[str, Any]:
    """Returns the config.json of a model, for transformers 4 and 5 alike.

    A token that the tokenizer doesn't have is None. Raises ConfigError where no class of
    transformers computes the model.
    """
    family = family_of(settings)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: attrgetter(ours)(settings) for ours, theirs in family.keys.items()},
        **family.constant,
        **_layers_json(settings, family),
        "head_dim": settings.head_dim,
        "max_position_embeddings": settings.max_seq_len,
        **rope_json(settings, silent=family.silent),
        "sliding_window": None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **router_json(settings, family),
        "use_cache": True,
        # Written even where there is none: the defaults of transformers are 1 and 2.
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def imported_model(config: Mapping[str, Any]) -> ImportedModel:
    """Returns the model of a config.json.

    Raises ConversionError for missing keys, and for what this decoder doesn't compute.
    """
    family = family_named(config.get("model_type"))
    if family is None:
        known = ", ".join(repr(known.model_type) for known in FAMILIES)
        raise ConversionError(
            f"config.json: model_type={config.get('model_type')!r}: only {known} can be imported"
        )
    _require_computable(config, family)
    values = _read_keys(config, family)
    if not family.is_moe:
        values |= {"num_experts": 1, "top_k": 1}
    elif values["num_experts"] == 1 or (
        values["top_k"] == 1 and values["router"]["normalize_gates"]
    ):
        ours = "num_experts" if values["num_experts"] == 1 else "top_k"
        raise ConversionError(
            f"config.json: {family.keys[ours]}=1: a lone expert's gate is 1 whatever its router "
            "says, so that the router is without use and could not be trained; import a model with "
            "two or more"
        )
    notes: list[str] = []
    carried: list[str] = []
    values |= _read_layers(config, family, values)
    window = config.get("sliding_window", family.silent.get("sliding_window"))
    if "use_sliding_window" in family.constant and not config.get("use_sliding_window"):
        window = None
    values["max_seq_len"] = _max_seq_len(config, notes, window=window)
    values |= read_rope(config, silent=family.silent)
    if family.is_moe:
        values["router"] |= read_router(config, family, values, carried)
    try:
        head_dim = config.get("head_dim") or family.silent.get("head_dim")
        head_dim = head_dim or values["dim"] // values["num_heads"]
        settings = validated({**values, "head_dim": head_dim}, ModelSettings)
    except (ConfigError, TypeError, ZeroDivisionError) as error:
        raise ConversionError(f"config.json: {error}") from None
    notes.extend(_not_carried(config, family))
    extra = config.get("num_nextn_predict_layers") or 0 if family is GLM4_MOE else 0
    if extra:
        notes.append(
            f"its num_nextn_predict_layers={extra}, which predict tokens further ahead, are not "
            "carried"
        )
    ids = {name: config.get(name) for name in _TOKEN_IDS}
    return ImportedModel(
        settings=settings,
        family=family,
        extra_layers=extra,
        carried=carried,
        notes=notes,
        token_ids=ids,
    )


def _read_keys(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the settings that a family's keys say, and those that it always has."""
    flat = dict(family.fixed)
    for ours, theirs in family.keys.items():
        value = config.get(theirs)
        if value is None and ours == "num_experts":
            value = config.get("num_local_experts")  # as transformers 5 writes it for Qwen3-MoE
        if value is None and theirs not in family.silent:
            raise ConversionError(f"config.json has no {theirs}")
        flat[ours] = family.silent[theirs] if value is None else value
    if not flat["qk_norm"]:
        flat.pop("qk_norm_scope", None)
    values: dict[str, Any] = {}
    for name, value in flat.items():
        part, _, key = name.rpartition(".")
        (values.setdefault(part, {}) if part else values)[key] = value
    return values


def _layers_json(settings: ModelSettings, family: Family) -> dict[str, Any]:
    """Returns the sizes of dense layers and shared experts, under the names of a family."""
    if "moe_intermediate_size" not in family.keys.values():
        return {}
    # Without dense layers the key has no meaning, and must still be a number.
    values: dict[str, Any] = {
        "intermediate_size": settings.dense_ffn_hidden_dim or settings.ffn_hidden_dim
    }
    if family in (QWEN2_MOE, QWEN3_MOE):
        values["mlp_only_layers"] = list(range(settings.num_dense_layers))
    if family is QWEN2_MOE:
        values["shared_expert_intermediate_size"] = (
            settings.num_shared_experts * settings.ffn_hidden_dim
        )
    return values


def _read_layers(
    config: Mapping[str, Any], family: Family, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the settings of dense layers and shared experts; of `values`, what they need."""
    found: dict[str, Any] = {}
    if family in (QWEN2_MOE, QWEN3_MOE):
        dense = sorted(config.get("mlp_only_layers") or [])
        if config.get("decoder_sparse_step", 1) != 1 or dense != list(range(len(dense))):
            raise ConversionError(
                f"config.json: decoder_sparse_step={config.get('decoder_sparse_step', 1)}, "
                f"mlp_only_layers={dense}: only the first layers can be without a router here"
            )
        found["num_dense_layers"] = len(dense)
    if family is QWEN2_MOE:
        hidden, size = config.get("shared_expert_intermediate_size"), values["ffn_hidden_dim"]
        if not isinstance(hidden, int) or not isinstance(size, int) or size < 1 or hidden % size:
            raise ConversionError(
                f"config.json: shared_expert_intermediate_size={hidden!r}: must be a multiple of "
                f"moe_intermediate_size={size}: shared experts are as large as the others here"
            )
        found["num_shared_experts"] = hidden // size
    if (found | dict(values)).get("num_dense_layers"):
        if config.get("intermediate_size") is None:
            raise ConversionError("config.json has no intermediate_size")
        found["dense_ffn_hidden_dim"] = config["intermediate_size"]
    return found


def _not_carried(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """Yields the keys of a config.json that can't be represented here."""
    if dropout := config.get("attention_dropout"):
        yield f"its attention_dropout={dropout} is not carried: there is no dropout here"
    known = {*family.keys.values(), *_TOKEN_IDS, *_READ, *_MEANINGLESS}
    if over := sorted(name for name, value in config.items() if value and name not in known):
        shown = ", ".join(f"{name}={_brief(config[name])}" for name in over)
        yield f"not known here, and not carried: {shown}"


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _require_computable(config: Mapping[str, Any], family: Family) -> None:
    activation = config.get("hidden_act", "silu")
    layers = config.get("layer_types") or []
    wrong = {
        "quantization_config": (config.get("quantization_config"), "its weights are quantised"),
        "auto_map": (config.get("auto_map"), "it brings code of its own, which is not run"),
        "attention_bias": (
            "attention_bias" not in family.keys.values() and config.get("attention_bias"),
            f"a {family.model_type} model has no such biases in transformers",
        ),
        "mlp_bias": (config.get("mlp_bias"), "feed-forward layers have no biases here"),
        "hidden_act": (
            None if activation in ("silu", "swish") else activation,
            "the experts' activation is silu here",
        ),
        "layer_types": (
            [kind for kind in layers if kind not in ("full_attention", "sliding_attention")],
            "attention is over all positions before, in every layer",
        ),
    }
    for name, (value, reason) in wrong.items():
        if value:
            shown = value if isinstance(value, str | bool | list) else "(given)"
            raise ConversionError(f"config.json: {name}={shown}: {reason}: it can't be imported")


def _max_seq_len(config: Mapping[str, Any], notes: list[str], *, window: Any) -> Any:
    """Returns the longest sequence over which theirs and ours attend alike."""
    length = config.get("max_position_embeddings")
    if not _is_count(length):
        raise ConversionError(
            f"config.json: max_position_embeddings={length!r}: must be a number from 1 on"
        )
    if window is not None and not _is_count(window):
        is_whole = isinstance(window, int) and not isinstance(window, bool)
        reason = "a position would see nothing: " if is_whole else ""
        raise ConversionError(
            f"config.json: sliding_window={window!r}: {reason}must be a whole number from 1 on, or "
            "null where there is no window"
        )
    if window is None or window >= length:
        return length
    said = "" if "sliding_window" in config else ", which is what transformers takes where no"
    notes.append(
        f"its sliding_window={window}{said and said + ' window is given'} is shorter than its "
        f"max_position_embeddings={length}: max_seq_len is {window}, up to which a window changes "
        "nothing"
    )
    return window


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
