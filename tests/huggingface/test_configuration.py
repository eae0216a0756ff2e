"""config.json in all its spellings; what Mixtral can't express, and what this decoder can't."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from moetrain.checks import ConfigError
from moetrain.huggingface.configuration import config_json, demand_expressible, imported_model
from moetrain.huggingface.names import ConversionError
from moetrain.model import ModelSettings, RouterSettings
from tests.support.huggingface_folders import TINY

MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "vocab_size": 31,
    "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": None, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL = {
    key: value
    for key, value in MIXTRAL.items()
    if key not in ("num_local_experts", "num_experts_per_tok")
} | {"model_type": "mistral"}


@pytest.mark.parametrize(
    "settings", [TINY, dataclasses.replace(TINY, num_experts=1, top_k=1, norm_eps=1e-6)]
)
def test_settings_to_config_and_back_are_the_same(settings: ModelSettings) -> None:
    config = config_json(settings, dtype="float32", bos_token_id=None, eos_token_id=None)
    back = imported_model(json.loads(json.dumps(config)))
    assert back.settings == settings
    assert not back.tied
    assert not back.notes


NEW_ROPE = {"rope_type": "default", "rope_theta": 1e4}
SPELLINGS: dict[str, dict[str, Any]] = {
    "old rope_theta": {},
    "rope_parameters": {"rope_theta": None, "rope_parameters": NEW_ROPE},
    "both": {"rope_parameters": NEW_ROPE},
    "an old rope_scaling that does not": {"rope_scaling": {"type": "default"}},
    "no rope_scaling": {"rope_scaling": None},
    "a window as long as the model": {"sliding_window": 64},
    "activation by its other name": {"hidden_act": "swish"},
    "keys that mean nothing here": {"use_cache": False, "_name_or_path": "x", "unknown": [1]},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("published", [MIXTRAL, MISTRAL], ids=["mixtral", "mistral"])
def test_every_spelling_is_the_same_model(published: dict[str, Any], spelling: str) -> None:
    model = imported_model(published | SPELLINGS[spelling])
    dense = {} if published is MIXTRAL else {"num_experts": 1, "top_k": 1}
    assert model.settings == dataclasses.replace(TINY, **dense)
    assert not model.notes


@pytest.mark.parametrize("published", [MIXTRAL, MISTRAL], ids=["mixtral", "mistral"])
def test_what_is_left_open_is_what_transformers_takes(
    tmp_path: Path, published: dict[str, Any]
) -> None:
    left_open = {
        key: value
        for key, value in published.items()
        if key not in ("rope_theta", "sliding_window", "head_dim", "tie_word_embeddings")
    } | {"max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(left_open))
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = imported_model(left_open)
    assert ours.settings.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.settings.max_seq_len == min(8192, theirs.sliding_window or 8192)
    assert ours.settings.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert ours.tied == theirs.tie_word_embeddings


def test_a_shorter_window_bounds_the_sequence_and_that_is_said() -> None:
    model = imported_model(MISTRAL | {"sliding_window": 48})
    assert model.settings.max_seq_len == 48
    assert "sliding_window=48 is shorter than its max_position_embeddings=64" in model.notes[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "llama"}, "model_type='llama'"),
    "no model type": ({"model_type": None}, "model_type=None"),
    "biases": ({"attention_bias": True}, "attention_bias=True"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "code of its own": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "linear attention": ({"layer_types": ["linear_attention"] * 2}, "layer_types"),
    "scaled positions": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    "scaled positions, new": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "rope_parameters",
    ),
    "half-turned heads": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "half-turned heads, new": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters",
    ),
    "two thetas": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_theta=10000.0 and rope_parameters.rope_theta=1000000.0",
    ),
    "rope of no form": ({"rope_parameters": [1]}, "rope_parameters=[1]"),
    "a lone choice": ({"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    "a lone expert": ({"num_local_experts": 1}, "num_local_experts=1"),
    "nothing said of a shape": ({"num_key_value_heads": None}, "no num_key_value_heads"),
    "a shape that is none": ({"hidden_size": -3}, "-3"),
    "a shape that is a list": ({"hidden_size": [24]}, "[24]"),
    "no heads": ({"num_attention_heads": 0, "head_dim": None}, "zero"),
    "not a number": ({"rms_norm_eps": float("nan")}, "norm_eps"),
    "a length in words": ({"max_position_embeddings": "long"}, "max_position_embeddings='long'"),
    "a window in words": ({"sliding_window": "wide"}, "sliding_window='wide'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_here_is_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(ConversionError) as error:
        imported_model(MIXTRAL | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_shared_experts": 1}, "model.num_shared_experts"),
        ({"num_dense_layers": 1, "dense_ffn_hidden_dim": 32}, "model.num_dense_layers"),
        ({"qk_norm": True}, "model.qk_norm"),
        ({"router": RouterSettings(score_function="sigmoid")}, "model.router.score_function"),
        ({"router": RouterSettings(normalize_gates=False)}, "model.router.normalize_gates"),
        ({"router": RouterSettings(num_groups=3)}, "model.router.num_groups"),
        (
            {"router": RouterSettings(routed_scaling_factor=2.5)},
            "model.router.routed_scaling_factor",
        ),
        ({"router": RouterSettings(force_balance=True)}, "model.router.force_balance"),
        ({"num_experts": 1, "top_k": 1, "qk_norm": True}, "model.qk_norm"),
    ],
)  # fmt: skip
def test_what_mixtral_has_not_is_refused_with_its_setting(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        demand_expressible(dataclasses.replace(TINY, **change))
    assert error.value.key == key


def test_what_only_training_has_is_no_reason_to_refuse() -> None:
    router = RouterSettings(
        jitter_noise=0.1, load_balance_loss_weight=0.5, bias_update_rate=0.1, z_loss_weight=0.0
    )
    demand_expressible(dataclasses.replace(TINY, router=router))
    sigmoid = RouterSettings(score_function="sigmoid")  # a dense model has no router
    demand_expressible(dataclasses.replace(TINY, num_experts=1, top_k=1, router=sigmoid))
