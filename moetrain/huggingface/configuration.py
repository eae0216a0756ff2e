"""A model's settings as a Hugging Face config.json of Mixtral or Mistral, and back.

Owns what either side can't express, and says so. Leaves the tensors to `names.py`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moetrain.checks import ConfigError
from moetrain.huggingface.names import ConversionError
from moetrain.settings import ModelSettings, RouterSettings
from moetrain.settings.validation import validated

MIXTRAL, MISTRAL = "mixtral", "mistral"
# The defaults of transformers for keys missing in config.json: the same in versions 4 and 5.
_SILENT: dict[str, dict[str, Any]] = {
    MIXTRAL: {"rope_theta": 1e6, "sliding_window": None},
    MISTRAL: {"rope_theta": 1e4, "sliding_window": 4096},
}
_SHAPE = {
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The keys that are read from a config.json besides its shape.
_READ = {
    "model_type", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "sliding_window", "hidden_act", "layer_types",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "attention_dropout", "auto_map",
    "quantization_config", "router_aux_loss_coef", "router_jitter_noise", "output_router_logits",
}  # fmt: skip
# Keys that don't describe the model: who wrote it, how it is loaded, what a call returns.
_MEANINGLESS = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path",
    "initializer_range", "output_attentions", "output_hidden_states", "return_dict",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "chunk_size_feed_forward", "id2label", "label2id", "torchscript", "pretraining_tp",
    "_commit_hash", "use_sliding_window", "experts_implementation",
}  # fmt: skip
_EXPERTS = {"num_experts": "num_local_experts", "top_k": "num_experts_per_tok"}


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """The model of a config.json, as settings of this project."""

    settings: ModelSettings
    tied: bool
    """Whether the head is the embedding."""
    carried: list[str]
    """Settings that were converted to another name or scale."""
    notes: list[str]
    """Differences from the original model that a user should know."""
    token_ids: dict[str, Any]
    """Its special tokens, for an export without a tokenizer."""


def require_expressible(settings: ModelSettings) -> None:
    """Raises ConfigError, with the setting, where Mixtral or Mistral compute something else."""
    only = {
        "num_shared_experts": (settings.num_shared_experts, 0),
        "num_dense_layers": (settings.num_dense_layers, 0),
        "qk_norm": (settings.qk_norm, False),
        "experts.function": (settings.experts.function, "swiglu"),
    }
    router, plain = settings.router, RouterSettings()
    for name in (
        "name",
        "score_function",
        "normalize_gates",
        "routed_scaling_factor",
        "num_groups",
        "force_balance",
    ):
        if settings.is_moe:
            only[f"router.{name}"] = (getattr(router, name), getattr(plain, name))
    for name, (value, expressible) in only.items():
        if value != expressible:
            raise ConfigError(
                f"model.{name}",
                value,
                f"Hugging Face's {'Mixtral' if settings.is_moe else 'Mistral'} has {expressible} "
                "and nothing else there, and would compute another function with these weights: "
                "a run with this setting can't be exported",
            )


def config_json(
    settings: ModelSettings,
    *,
    dtype: str,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
) -> dict[str, Any]:
    """Returns the config.json of a model, for transformers 4 and 5 alike.

    A token that the tokenizer doesn't have is None. Raises ConfigError where Mixtral or Mistral
    can't express the model.
    """
    require_expressible(settings)
    names = _SHAPE | (_EXPERTS if settings.is_moe else {})
    kind = MIXTRAL if settings.is_moe else MISTRAL
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(settings, ours) for ours, theirs in names.items()},
        "head_dim": settings.head_dim,
        "max_position_embeddings": settings.max_seq_len,
        # Version 5 reads the second; version 4, and tools made for it, the first.
        "rope_theta": settings.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "sliding_window": None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        **_router_json(settings),
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
    kind = config.get("model_type")
    if kind not in _SILENT:
        raise ConversionError(
            f"config.json: model_type={kind!r}: only {MIXTRAL!r} and {MISTRAL!r} can be imported"
        )
    _require_computable(config)
    names = _SHAPE | (_EXPERTS if kind == MIXTRAL else {})
    if missing := [theirs for theirs in names.values() if config.get(theirs) is None]:
        raise ConversionError(f"config.json has no {missing[0]}")
    values = {ours: config[theirs] for ours, theirs in names.items()}
    if kind == MISTRAL:
        values |= {"num_experts": 1, "top_k": 1}
    elif values["num_experts"] == 1 or values["top_k"] == 1:
        name = "num_local_experts" if values["num_experts"] == 1 else "num_experts_per_tok"
        raise ConversionError(
            f"config.json: {name}=1: a lone expert's gate is 1 whatever its router says, so that "
            "the router is without use and could not be trained; import a model with two or more"
        )
    notes: list[str] = []
    carried: list[str] = []
    if kind == MIXTRAL:
        values["router"] = _router(config, carried)
    values["max_seq_len"] = _max_seq_len(config, notes, silent=_SILENT[kind]["sliding_window"])
    values["rope_theta"] = _rope_theta(config, silent=_SILENT[kind]["rope_theta"])
    try:
        head_dim = config.get("head_dim") or values["dim"] // values["num_heads"]
        settings = validated({**values, "head_dim": head_dim}, ModelSettings)
    except (ConfigError, TypeError, ZeroDivisionError) as error:
        raise ConversionError(f"config.json: {error}") from None
    tied = bool(config.get("tie_word_embeddings", False))
    if tied:
        notes.append(
            "its head is tied to its embedding: here the head is a copy, and the two train apart"
        )
    notes.extend(_not_carried(config))
    ids = {name: config.get(name) for name in _TOKEN_IDS}
    return ImportedModel(settings=settings, tied=tied, carried=carried, notes=notes, token_ids=ids)


def load_balance_loss_weight(coefficient: float, *, top_k: int, num_layers: int) -> float:
    """Returns the weight here of a `router_aux_loss_coef` there.

    Theirs multiplies one loss over the choices and probabilities of all layers together, which is
    top_k when balanced; ours the sum of a loss for each layer, 1 when balanced. The weight makes
    the two equal where all layers are alike, and so in each model of one layer. Else they are not
    the same function: pooled, layers that collapse onto different experts look balanced.
    """
    return float(f"{coefficient * top_k / num_layers:.15g}")


def router_aux_loss_coef(weight: float, *, top_k: int, num_layers: int) -> float:
    """Returns the coefficient there of a weight here: the shortest number that comes back as it."""
    exact = weight * num_layers / top_k
    for digits in (12, 17):
        short = float(f"{exact:.{digits}g}")
        if load_balance_loss_weight(short, top_k=top_k, num_layers=num_layers) == weight:
            return short
    return exact


def _router_json(settings: ModelSettings) -> dict[str, Any]:
    if not settings.is_moe:
        return {}
    weight = settings.router.load_balance_loss_weight
    layers = settings.num_moe_layers
    return {
        "router_aux_loss_coef": router_aux_loss_coef(
            weight, top_k=settings.top_k, num_layers=layers
        ),
        "router_jitter_noise": settings.router.jitter_noise,
        "output_router_logits": False,
    }


def _router(config: Mapping[str, Any], carried: list[str]) -> dict[str, float]:
    """Returns how the router is trained, where a config.json says it."""
    found = {}
    if (coefficient := _nonnegative(config, "router_aux_loss_coef")) is not None:
        top_k, layers = config["num_experts_per_tok"], config["num_hidden_layers"]
        if not all(isinstance(n, int) and n > 0 for n in (top_k, layers)):
            return {}  # said with the shape
        weight = load_balance_loss_weight(coefficient, top_k=top_k, num_layers=layers)
        found["load_balance_loss_weight"] = weight
        carried.append(
            f"router_aux_loss_coef={coefficient} as model.router.load_balance_loss_weight="
            f"{weight} (times top_k={top_k}, over {layers} layers: the same where these are "
            "balanced alike)"
        )
    if noise := _nonnegative(config, "router_jitter_noise"):
        if noise >= 1:
            raise ConversionError(
                f"config.json: router_jitter_noise={config['router_jitter_noise']}: must be less "
                "than 1, for the router's input is multiplied by numbers from 1 - this to 1 + this"
            )
        found["jitter_noise"] = noise
        carried.append(
            f"router_jitter_noise={noise} as model.router.jitter_noise={noise} (on the "
            "router's input alone; transformers has it on the experts' too)"
        )
    return found


def _nonnegative(config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ConversionError(f"config.json: {name}={value!r}: must be a number from 0 on")
    return float(value)


def _not_carried(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields the keys of a config.json that can't be represented here."""
    if dropout := config.get("attention_dropout"):
        yield f"its attention_dropout={dropout} is not carried: there is no dropout here"
    known = {*_SHAPE.values(), *_EXPERTS.values(), *_TOKEN_IDS, *_READ, *_MEANINGLESS}
    if over := sorted(name for name, value in config.items() if value and name not in known):
        shown = ", ".join(f"{name}={_brief(config[name])}" for name in over)
        yield f"not known here, and not carried: {shown}"


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _require_computable(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    layers = config.get("layer_types") or []
    wrong = {
        "quantization_config": (config.get("quantization_config"), "its weights are quantised"),
        "auto_map": (config.get("auto_map"), "it brings code of its own, which is not run"),
        "attention_bias": (config.get("attention_bias"), "attention has no biases here"),
        "mlp_bias": (config.get("mlp_bias"), "feed-forward layers have no biases here"),
        "hidden_act": (
            None if activation in ("silu", "swish") else activation,
            "the experts' activation is silu here",
        ),
        "layer_types": (
            [kind for kind in layers if kind not in ("full_attention", "sliding_attention")],
            "attention is over all positions before, in every layer",
        ),
        "partial_rotary_factor": (
            None if config.get("partial_rotary_factor", 1.0) == 1.0 else "another than 1",
            "rotary positions turn whole heads here",
        ),
    }
    for name, (value, reason) in wrong.items():
        if value:
            shown = value if isinstance(value, str | bool | list) else "(given)"
            raise ConversionError(f"config.json: {name}={shown}: {reason}: it can't be imported")


def _rope_theta(config: Mapping[str, Any], *, silent: float) -> Any:
    """Returns the base of rotary positions: named by itself, as of old, or in rope_parameters."""
    thetas = {}
    if config.get("rope_theta") is not None:
        thetas["rope_theta"] = config["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        if not isinstance(rope, Mapping):
            raise ConversionError(f"config.json: {name}={rope!r}: must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        scaled = sorted(set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if kind != "default" or scaled or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConversionError(
                f"config.json: {name}={dict(rope)}: scaled or partial rotary positions are not "
                "computed here: it can't be imported"
            )
        if "rope_theta" in rope:
            thetas[f"{name}.rope_theta"] = rope["rope_theta"]
    if len(set(thetas.values())) > 1:
        told = " and ".join(f"{name}={theta}" for name, theta in thetas.items())
        raise ConversionError(f"config.json: {told}: which of them holds can't be known")
    return next(iter(thetas.values()), silent)


def _max_seq_len(config: Mapping[str, Any], notes: list[str], *, silent: int | None) -> Any:
    """Returns the longest sequence over which theirs and ours attend alike."""
    length = config.get("max_position_embeddings")
    window = config.get("sliding_window", silent)
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
