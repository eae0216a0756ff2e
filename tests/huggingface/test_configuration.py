"""config.json in all its spellings; what Mixtral can't express, and what this decoder can't."""

import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moetrain.checks import ConfigError
from moetrain.huggingface.balance import load_balance_loss_weight, router_aux_loss_coef
from moetrain.huggingface.configuration import config_json, imported_model
from moetrain.huggingface.families import FAMILIES as KNOWN
from moetrain.huggingface.families import family_of
from moetrain.huggingface.names import ConversionError
from moetrain.model import load_balance_loss
from moetrain.settings import ModelSettings, RouterSettings
from moetrain.settings.validation import validated
from tests.support.huggingface_folders import FAMILIES, TINY

PRESETS = Path(__file__).parents[2] / "conf" / "model"
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


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_to_config_and_back_are_the_same(name: str) -> None:
    settings = FAMILIES[name]
    config = config_json(settings, dtype="float32", bos_token_id=None, eos_token_id=None)
    assert config["model_type"] == name.split()[0]
    back = imported_model(json.loads(json.dumps(config)))
    router = settings.router
    if "router_aux_loss_coef" not in config:  # what only training has is in no config.json
        router = dataclasses.replace(router, load_balance_loss_weight=0.01)
    assert back.settings == dataclasses.replace(settings, router=router)
    assert not back.notes


def test_the_families_are_all_tried() -> None:
    assert {name.split()[0] for name in FAMILIES} == {f.model_type for f in KNOWN}


def test_a_llama_folder_is_a_mistral_without_a_window() -> None:
    llama = imported_model(MISTRAL | {"model_type": "llama"})
    assert llama.settings == imported_model(MISTRAL).settings
    scaled = {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    published = MISTRAL | {"model_type": "llama", "rope_scaling": scaled}
    scaling = imported_model(published).settings.rope_scaling
    assert (scaling.type, scaling.factor, scaling.original_max_seq_len) == ("llama3", 8.0, 32)


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
    assert ours.settings.tie_embeddings == theirs.tie_word_embeddings


def test_a_shorter_window_bounds_the_sequence_and_that_is_said() -> None:
    model = imported_model(MISTRAL | {"sliding_window": 48})
    assert model.settings.max_seq_len == 48
    assert "sliding_window=48 is shorter than its max_position_embeddings=64" in model.notes[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "gpt2"}, "model_type='gpt2'"),
    "no model type": ({"model_type": None}, "model_type=None"),
    "biases": ({"attention_bias": True}, "attention_bias=True"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "code of its own": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "linear attention": ({"layer_types": ["linear_attention"] * 2}, "layer_types"),
    "scaled positions": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
    "scaled positions, new": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}},
        "rope_parameters",
    ),
    "scaled positions, in another way": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
        "truncate is not computed here",
    ),
    "scaled twice": (
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
        "which of them holds",
    ),
    "scaled by a part": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
    "half-turned heads": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "half-turned heads, new": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
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
        ({"qk_norm": True}, "model.qk_norm"),  # over 40 dimensions of 24: OLMoE's are as many
        ({"router": RouterSettings(num_groups=3)}, "model.router.num_groups"),
        (
            {"router": RouterSettings(score_function="sigmoid", num_groups=3)},
            "model.router.num_groups",
        ),
        (
            {"router": RouterSettings(routed_scaling_factor=2.5)},
            "model.router.routed_scaling_factor",
        ),
        ({"router": RouterSettings(force_balance=True)}, "model.router.force_balance"),
        ({"num_experts": 1, "top_k": 1, "qk_norm": True}, "model.qk_norm"),
        ({"clip_qkv": 8.0}, "model.clip_qkv"),
        ({"attention_output_bias": True}, "model.attention_output_bias"),
        (
            {"num_experts": 1, "top_k": 1, "attention_output_bias": True},
            "model.attention_output_bias",
        ),
        (
            {
                "num_experts": 1, "top_k": 1, "attention_output_bias": True, "qk_norm": True,
                "qk_norm_scope": "head",
            },
            "model.attention_output_bias",
        ),
        ({"logit_soft_cap": 30.0}, "model.logit_soft_cap"),
        ({"partial_rotary_factor": 0.4}, "model.partial_rotary_factor"),
        (
            {"attention_bias": True, "qk_norm": True, "qk_norm_scope": "head"},
            "model.attention_bias",
        ),
        ({"num_experts": 1, "top_k": 1, "clip_qkv": 8.0}, "model.clip_qkv"),
        ({"num_experts": 1, "top_k": 1, "logit_soft_cap": 30.0}, "model.logit_soft_cap"),
    ],
)  # fmt: skip
def test_what_no_class_computes_is_refused_with_its_setting(
    change: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as error:
        family_of(dataclasses.replace(TINY, **change))
    assert error.value.key == key


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_has_a_class_that_computes_it(preset: str) -> None:
    settings = validated(yaml.safe_load((PRESETS / f"{preset}.yaml").read_text()), ModelSettings)
    config = config_json(settings, dtype="float32", bos_token_id=None, eos_token_id=None)
    back = imported_model(json.loads(json.dumps(config))).settings
    assert dataclasses.replace(back, router=settings.router) == settings


def test_every_router_goes_to_a_class_that_computes_it_or_is_refused_by_its_name() -> None:
    """Which class, and with which settings back, for all combinations of a router's settings."""
    went: Counter[str] = Counter()
    for score, normalised, groups, scaling, shared, dense in itertools.product(
        ("softmax", "sigmoid"), (True, False), (1, 2), (1.0, 2.5), (0, 1), (0, 1)
    ):
        router = RouterSettings(
            score_function=score,
            normalize_gates=normalised,
            num_groups=groups,
            routed_scaling_factor=scaling,
        )
        settings = dataclasses.replace(
            TINY,
            num_experts=4,
            num_shared_experts=shared,
            num_dense_layers=dense,
            dense_ffn_hidden_dim=20 if dense else None,
            router=router,
        )
        try:
            config = config_json(settings, dtype="float32", bos_token_id=None, eos_token_id=None)
        except ConfigError as error:
            went[error.key] += 1
            continue
        assert imported_model(json.loads(json.dumps(config))).settings == settings
        went[config["model_type"]] += 1
    assert went == {
        "mixtral": 1, "qwen2_moe": 7, "glm4_moe": 32,  # all of DeepSeek-V3's router has a class
        "model.router.num_groups": 8, "model.router.routed_scaling_factor": 8,
        "model.router.score_function": 8,  # with groups and a factor, only softmax is in the way
    }  # fmt: skip


def test_what_only_training_has_is_no_reason_to_refuse() -> None:
    router = RouterSettings(
        jitter_noise=0.1, load_balance_loss_weight=0.5, bias_update_rate=0.1, z_loss_weight=0.0
    )
    assert family_of(dataclasses.replace(TINY, router=router)).model_type == "mixtral"
    sigmoid = RouterSettings(score_function="sigmoid")  # a dense model has no router
    dense = dataclasses.replace(TINY, num_experts=1, top_k=1, router=sigmoid)
    assert family_of(dense).model_type == "mistral"
