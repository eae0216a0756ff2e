"""config.json in all its spellings; what Mixtral can't express, and what this decoder can't."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moetrain.checks import ConfigError
from moetrain.huggingface.configuration import (
    config_json,
    imported_model,
    load_balance_loss_weight,
    require_expressible,
    router_aux_loss_coef,
)
from moetrain.huggingface.names import ConversionError
from moetrain.model import load_balance_loss
from moetrain.settings import ModelSettings, RouterSettings
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


@pytest.mark.parametrize(
    ("num_layers", "top_k"),
    [(32, 2), (56, 2), (7, 3), (24, 6), (1, 1)],
    ids=lambda value: str(value),
)
def test_the_balance_coefficient_comes_back_as_it_was(num_layers: int, top_k: int) -> None:
    of = {"top_k": top_k, "num_layers": num_layers}
    for number in (0.0, 0.001, 0.02, 0.01, 0.00125, 1 / 3, 1e-4, 0.9, 5.4e-3):
        coefficient = float(f"{number:.12g}")
        weight = load_balance_loss_weight(coefficient, **of)
        assert router_aux_loss_coef(weight, **of) == coefficient
        weight = float(f"{number:.15g}")
        assert load_balance_loss_weight(router_aux_loss_coef(weight, **of), **of) == weight


@pytest.mark.parametrize(("num_layers", "alike"), [(1, True), (5, True), (5, False)])
def test_the_balance_weight_gives_the_loss_of_transformers(num_layers: int, alike: bool) -> None:
    """Whatever the loads, as long as all layers have the same; pooled, others are not the same."""
    experts, top_k, tokens = 6, 2, 500
    generator = torch.Generator().manual_seed(0)
    shape = (1 if alike else num_layers, tokens, experts)
    logits = (3 * torch.randn(shape, generator=generator)).expand(num_layers, -1, -1)
    logits = logits + torch.eye(experts)[:num_layers, None] * 4  # each layer has a favourite …
    if alike:
        logits = logits[:1].expand(num_layers, -1, -1)  # … or all the same
    coefficient = 0.02
    theirs = coefficient * load_balancing_loss_func(tuple(logits), experts, top_k)
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(top_k).indices.flatten(1)
    counts = torch.stack([layer.bincount(minlength=experts) for layer in chosen])
    ours = load_balance_loss(
        counts, probabilities.sum(1), top_k=top_k, counted_tokens=tokens, num_tokens=tokens
    )
    weight = load_balance_loss_weight(coefficient, top_k=top_k, num_layers=num_layers)
    assert ours.min() > 1.2  # far from balanced, so that another scale would show
    # Sums of 500 probabilities in float32.
    same = torch.allclose(weight * ours.sum(), theirs, rtol=500 * torch.finfo().eps)
    assert same is alike
    if not alike:
        assert theirs < weight * ours.sum()  # their pooled loss sees less of it


def test_how_the_router_was_trained_is_carried_both_ways_and_told() -> None:
    trained = MIXTRAL | {
        "num_hidden_layers": 4, "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.1,
        "output_router_logits": True,
    }  # fmt: skip
    model = imported_model(trained)
    assert model.settings.router == RouterSettings(load_balance_loss_weight=0.01, jitter_noise=0.1)
    first, second = model.carried
    assert first.startswith(
        "router_aux_loss_coef=0.02 as model.router.load_balance_loss_weight=0.01 "
    )
    assert second.startswith("router_jitter_noise=0.1 as model.router.jitter_noise=0.1 ")
    assert not model.notes
    back = config_json(model.settings, dtype="float32", bos_token_id=1, eos_token_id=2)
    assert (back["router_aux_loss_coef"], back["router_jitter_noise"]) == (0.02, 0.1)
    assert not imported_model(MIXTRAL).carried  # what nobody said is ours to choose
    assert imported_model(MIXTRAL | {"router_aux_loss_coef": 0}).settings.router == RouterSettings(
        load_balance_loss_weight=0.0
    )


def test_what_is_not_carried_is_told() -> None:
    config = MIXTRAL | {
        "attention_dropout": 0.1, "resid_pdrop": 0.2, "use_cache": True, "off": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    assert imported_model(config).notes == [
        "its attention_dropout=0.1 is not carried: there is no dropout here",
        "not known here, and not carried: resid_pdrop=0.2",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sliding_window": 0}, "sliding_window=0: a position would see nothing"),
        ({"sliding_window": -1}, "sliding_window=-1: a position would see nothing"),
        ({"sliding_window": True}, "sliding_window=True: must be a whole number from 1 on, or"),
        ({"sliding_window": "x"}, "sliding_window='x': must be a whole number from 1 on, or null"),
        ({"sliding_window": 16.5}, "sliding_window=16.5: must be a whole number from 1 on, or"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0: must be a number from 1 on"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1: must be a number from 0 on"),
        ({"router_aux_loss_coef": "0.1"}, "router_aux_loss_coef='0.1': must be a number"),
        ({"router_jitter_noise": 1.5}, "json: router_jitter_noise=1.5: must be less than 1"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_its_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConversionError, match=re.escape(said)):
        imported_model(MIXTRAL | change)


NEW_ROPE = {"rope_type": "default", "rope_theta": 1e4}
SPELLINGS: dict[str, dict[str, Any]] = {
    "old rope_theta": {},
    "rope_parameters": {"rope_theta": None, "rope_parameters": NEW_ROPE},
    "both": {"rope_parameters": NEW_ROPE},
    "an old rope_scaling that does not": {"rope_scaling": {"type": "default"}},
    "no rope_scaling": {"rope_scaling": None},
    "a window as long as the model": {"sliding_window": 64},
    "activation by its other name": {"hidden_act": "swish"},
    "keys that mean nothing here": {"use_cache": False, "_name_or_path": "x", "unknown": None},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("published", [MIXTRAL, MISTRAL], ids=["mixtral", "mistral"])
def test_every_spelling_is_the_same_model(published: dict[str, Any], spelling: str) -> None:
    model = imported_model(published | SPELLINGS[spelling])
    dense: dict[str, Any] = {} if published is MIXTRAL else {"num_experts": 1, "top_k": 1}
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
        require_expressible(dataclasses.replace(TINY, **change))
    assert error.value.key == key


def test_what_only_training_has_is_no_reason_to_refuse() -> None:
    router = RouterSettings(
        jitter_noise=0.1, load_balance_loss_weight=0.5, bias_update_rate=0.1, z_loss_weight=0.0
    )
    require_expressible(dataclasses.replace(TINY, router=router))
    sigmoid = RouterSettings(score_function="sigmoid")  # a dense model has no router
    require_expressible(dataclasses.replace(TINY, num_experts=1, top_k=1, router=sigmoid))
