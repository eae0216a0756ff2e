"""The model classes of transformers that compute what the settings of a model say.

Owns which settings each class computes, under which keys of config.json, and which class a model
goes to. Leaves the rest of config.json to `configuration.py`, and the tensors to `names.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from moetrain.checks import ConfigError
from moetrain.settings import ModelSettings

Mismatch = tuple[str, Any, str]
"""A setting, its value, and what a class has in its place."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model class, and what it computes."""

    model_type: str
    architecture: str
    fixed: Mapping[str, Any]
    """Settings that have one value there."""
    keys: Mapping[str, str]
    """The other settings, each with the key that has the same value."""
    silent: Mapping[str, Any] = field(default_factory=dict)
    """The defaults of transformers for keys that a config.json leaves out."""
    constant: Mapping[str, Any] = field(default_factory=dict)
    """Keys that every model of ours has with the same value."""
    limit: Callable[[ModelSettings], Mismatch | None] = lambda _: None
    """What else the class can't compute."""
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """The names of an expert's matrices, one expert by itself."""
    published_layer: str = "mlp"
    """The name of the MoE layer, where the experts are by themselves."""
    shared_experts: str = ""
    """The name of the shared experts in it."""
    gates_shared_experts: bool = False
    """Whether a gate, sigmoid of a projection, multiplies the shared experts' output."""
    has_selection_bias: bool = False
    has_balance_loss: bool = False
    """Whether the class can add a balance loss, by `router_aux_loss_coef`."""

    @property
    def is_moe(self) -> bool:
        """Whether it has routers."""
        return "num_experts" in self.keys

    def mismatches(self, settings: ModelSettings) -> Iterator[Mismatch]:
        """Yields the settings that it doesn't compute."""
        for name, expressible in self.fixed.items():
            value = attrgetter(name)(settings)
            if value != expressible and not (name == "qk_norm_scope" and not settings.qk_norm):
                yield name, value, str(expressible)
        if other := self.limit(settings):
            yield other


_SHAPE = {
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_ONE_SIZE = {**_SHAPE, "ffn_hidden_dim": "intermediate_size"}
_TWO_SIZES = {
    **_SHAPE,
    "ffn_hidden_dim": "moe_intermediate_size",
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "router.normalize_gates": "norm_topk_prob",
}
_DENSE = {
    "experts.function": "swiglu",
    "partial_rotary_factor": 1.0,
    "clip_qkv": None,
    "qk_norm": False,
    "attention_bias": False,
    "attention_output_bias": False,
    "logit_soft_cap": None,
}
_MOE = {
    **_DENSE,
    "router.name": "top_k",
    "router.force_balance": False,
    "router.score_function": "softmax",
    "router.num_groups": 1,
    "router.routed_scaling_factor": 1.0,
    "num_shared_experts": 0,
    "num_dense_layers": 0,
}
_WHOLE = {"qk_norm": True, "qk_norm_scope": "whole"}
_PER_HEAD = {"qk_norm": True, "qk_norm_scope": "head"}
_SILENT = {"tie_word_embeddings": False}
# One key for the biases of all four projections.
_ALL_BIASES = {"attention_bias": "attention_bias", "attention_output_bias": "attention_bias"}
_NO_BIAS = {"attention_bias": False}
_NO_WINDOW = {"use_sliding_window": False}


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _heads_fill_dim(settings: ModelSettings) -> Mismatch | None:
    if settings.num_heads * settings.head_dim == settings.dim:
        return None
    return "head_dim", settings.head_dim, f"dim / num_heads={settings.dim / settings.num_heads:g}"


def _all_biases_or_none(settings: ModelSettings) -> Mismatch | None:
    output, others = settings.attention_output_bias, settings.attention_bias
    if output == others:
        return None
    if others:
        return "attention_bias", True, "it together with model.attention_output_bias=true"
    return "attention_output_bias", True, "it together with model.attention_bias=true"


def _limits_of_olmoe(settings: ModelSettings) -> Mismatch | None:
    return _heads_fill_dim(settings) or _all_biases_or_none(settings)


def _groups_of_two(settings: ModelSettings) -> Mismatch | None:
    groups = settings.router.num_groups
    if settings.num_experts >= 2 * groups:
        return None
    return "router.num_groups", groups, "two experts or more in each group"


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fixed=_DENSE,
    keys=_ONE_SIZE,
    silent=_SILENT | {"rope_theta": 1e4, "sliding_window": 4096},
)
# Mistral without a window, and with biases or none: without them it is exported as Mistral.
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fixed=_without(_DENSE, *_ALL_BIASES),
    keys=_ONE_SIZE | _ALL_BIASES,
    silent=_SILENT | _NO_BIAS | {"rope_theta": 1e4},
    limit=_all_biases_or_none,
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed=_DENSE | {"attention_bias": True},
    keys=_ONE_SIZE,
    silent=_SILENT | {"rope_theta": 1e4},
    constant=_NO_WINDOW,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed=_without(_DENSE, *_ALL_BIASES) | _PER_HEAD,
    keys=_ONE_SIZE | _ALL_BIASES,
    silent=_SILENT | _NO_BIAS | {"rope_theta": 1e4, "head_dim": 128},
    constant=_NO_WINDOW,
    limit=_all_biases_or_none,
)
MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fixed=_MOE | {"router.normalize_gates": True},
    keys=_ONE_SIZE | {"num_experts": "num_local_experts", "top_k": "num_experts_per_tok"},
    silent=_SILENT | {"rope_theta": 1e6},
    expert_names=("w1", "w3", "w2"),
    published_layer="block_sparse_moe",
    has_balance_loss=True,
)
OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    fixed=_without(_MOE, "clip_qkv", *_ALL_BIASES) | _WHOLE,
    keys=_without(_TWO_SIZES, "ffn_hidden_dim")
    | {"ffn_hidden_dim": "intermediate_size", "clip_qkv": "clip_qkv"}
    | _ALL_BIASES,
    silent=_SILENT | _NO_BIAS | {"rope_theta": 1e4, "norm_topk_prob": False, "clip_qkv": None},
    limit=_limits_of_olmoe,
    has_balance_loss=True,
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fixed=_without(_MOE, "num_dense_layers", *_ALL_BIASES) | _PER_HEAD,
    keys=_TWO_SIZES | _ALL_BIASES,
    silent=_SILENT | _NO_BIAS | {"rope_theta": 1e4, "norm_topk_prob": False},
    constant=_NO_WINDOW | {"decoder_sparse_step": 1},
    limit=_all_biases_or_none,
    has_balance_loss=True,
)
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    fixed=_without(_MOE, "num_dense_layers", "num_shared_experts", "attention_bias"),
    keys=_TWO_SIZES | {"attention_bias": "qkv_bias"},
    silent=_SILENT | {"rope_theta": 1e4, "norm_topk_prob": False, "qkv_bias": True},
    constant=_NO_WINDOW | {"decoder_sparse_step": 1},
    shared_experts="shared_expert",
    gates_shared_experts=True,
    has_balance_loss=True,
)
GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    fixed=_without(
        _MOE,
        *("qk_norm", "attention_bias", "partial_rotary_factor", "num_shared_experts"),
        *("num_dense_layers", "router.num_groups", "router.routed_scaling_factor"),
    )
    | {"router.score_function": "sigmoid", "qk_norm_scope": "head"},
    keys=_TWO_SIZES
    | {
        "num_experts": "n_routed_experts",
        "qk_norm": "use_qk_norm",
        "attention_bias": "attention_bias",
        "num_shared_experts": "n_shared_experts",
        "num_dense_layers": "first_k_dense_replace",
        "router.num_groups": "n_group",
        "router.top_groups": "topk_group",
        "router.routed_scaling_factor": "routed_scaling_factor",
    },
    silent=_SILENT
    | {
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "attention_bias": False,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    # Else transformers makes a layer that predicts a token further ahead, with random weights.
    constant={"num_nextn_predict_layers": 0},
    limit=_groups_of_two,
    shared_experts="shared_experts",
    has_selection_bias=True,
)
# In this order: the plainest class that computes a model is taken.
FAMILIES = (MISTRAL, LLAMA, QWEN2, QWEN3, MIXTRAL, OLMOE, QWEN3_MOE, QWEN2_MOE, GLM4_MOE)


def family_of(settings: ModelSettings) -> Family:
    """Returns the class that computes a model.

    Raises ConfigError, with the setting that no class has together with the others.
    """
    candidates = [family for family in FAMILIES if family.is_moe == settings.is_moe]
    found = {family.architecture: list(family.mismatches(settings)) for family in candidates}
    nearest = min(candidates, key=lambda family: len(found[family.architecture]))
    if not found[nearest.architecture]:
        return nearest
    name, value, expressible = found[nearest.architecture][0]
    raise ConfigError(
        f"model.{name}",
        value,
        f"no model class of transformers computes this together with the rest of the model, and "
        f"would compute another function with these weights: the nearest, {nearest.architecture}, "
        f"has {expressible} there: a run with this setting can't be exported",
    )


def family_named(model_type: object) -> Family | None:
    """Returns the class of a config.json's `model_type`; None where it can't be imported."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)
