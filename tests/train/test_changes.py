"""What two configurations differ in, and what each setting decides."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from moetrain.settings import Config, ModelSettings
from moetrain.train.changes import _KINDS, Kind, as_plain, as_typed_value, changes, kind_of
from tests.support.runs import tiny_config


def names(tree: Any, path: str) -> list[str]:
    """Returns all settings of a part of the configuration."""
    found = []
    for field in fields(tree):
        name = f"{path}.{field.name}".lstrip(".")
        found += names(field.type, name) if is_dataclass(field.type) else [name]
    return found


# By hand, so that a new setting of the model fails this test until somebody has thought about it.
FUNCTION = {
    "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_dim", "num_experts",
    "top_k", "vocab_size", "rope_theta", "norm_eps", "num_shared_experts", "num_dense_layers",
    "dense_ffn_hidden_dim", "qk_norm", "qk_norm_scope", "clip_qkv", "attention_bias",
    "attention_output_bias", "logit_soft_cap",
    "tie_embeddings", "partial_rotary_factor", "rope_scaling.type", "rope_scaling.factor",
    "rope_scaling.original_max_seq_len", "rope_scaling.low_freq_factor",
    "rope_scaling.high_freq_factor", "rope_scaling.beta_fast", "rope_scaling.beta_slow",
    "rope_scaling.attention_factor", "router.score_function", "router.normalize_gates",
    "router.routed_scaling_factor", "router.num_groups", "router.top_groups",
    "router.force_balance", "router.name", "router.options", "experts.function",
    "experts.options",
}  # fmt: skip
RECIPE = {
    "max_seq_len", "router.load_balance_loss_weight", "router.load_balance_scope",
    "router.z_loss_weight", "router.bias_update_rate", "router.jitter_noise", "init.std",
    "init.truncate_at", "init.residual_scale", "init.embedding_std", "init.head_std",
    "init.router_std", "head_z_loss_weight",
}  # fmt: skip
LAYOUT = {"loss_chunk_size", "attention_kernel", "experts.backend", "experts.recompute"}


def test_each_setting_of_the_model_is_classified() -> None:
    kinds = {name: kind_of(f"model.{name}") for name in names(ModelSettings, "")}
    expected = {
        **dict.fromkeys(FUNCTION, Kind.function),
        **dict.fromkeys(RECIPE, Kind.recipe),
        **dict.fromkeys(LAYOUT, Kind.layout),
        "pad_vocab_to_multiple_of": Kind.incidental,
    }
    assert kinds == expected


def test_a_new_setting_of_the_model_changes_its_function_until_it_is_listed() -> None:
    assert kind_of("model.new") is Kind.function
    assert kind_of("model.router.new") is Kind.function
    assert kind_of("model.experts.new") is Kind.function
    assert kind_of("optim.new") is Kind.recipe
    assert kind_of("new") is Kind.recipe


def test_every_setting_that_is_listed_is_there() -> None:
    known = names(Config, "")
    for listed in filter(None, _KINDS):
        assert any(f"{name}.".startswith(f"{listed}.") for name in known), listed


def test_a_configuration_does_not_differ_from_itself(tmp_path: Path) -> None:
    plain = as_plain(tiny_config(tmp_path, shards=tmp_path))
    assert changes(plain, plain) == []


@pytest.mark.parametrize(
    ("setting", "value", "said", "kind"),
    [
        ("optim__lr", 0.02, "optim.lr 0.01 → 0.02", Kind.recipe),
        ("optim__betas", (0.9, 0.99), "optim.betas [0.9,0.95] → [0.9,0.99]", Kind.recipe),
        ("optim__clip_grad_norm", None, "optim.clip_grad_norm 1.0 → null", Kind.recipe),
        ("schedule__name", "wsd", "schedule.name cosine → wsd", Kind.recipe),
        ("train__num_steps", 9, "train.num_steps 8 → 9", Kind.recipe),
        ("train__global_batch_size", 16, "train.global_batch_size 8 → 16", Kind.recipe),
        ("data__weights", {"en": 0.5}, "data.weights.en null → 0.5", Kind.recipe),
        ("data__mask_documents", True, "data.mask_documents false → true", Kind.recipe),
        ("data__packing", "best_fit", "data.packing stream → best_fit", Kind.order),
        ("seed", 1, "seed 0 → 1", Kind.order),
        ("observe__log_every_steps", 2, "observe.log_every_steps 1 → 2", Kind.incidental),
        ("model__router__num_groups", 2, "model.router.num_groups 1 → 2", Kind.function),
    ],
)
def test_a_difference_is_named_with_both_values(
    tmp_path: Path, setting: str, value: Any, said: str, kind: Kind
) -> None:
    before = as_plain(tiny_config(tmp_path, shards=tmp_path))
    now = as_plain(tiny_config(tmp_path, shards=tmp_path, **{setting: value}))
    found = [change for change in changes(before, now) if change.kind is not Kind.layout]
    assert [(str(change), change.kind) for change in found] == [(said, kind)]


def test_a_value_is_shown_as_it_is_typed() -> None:
    stages = [{"from_step": 3, "weights": {"en": 0.5, "code": None}}]
    text = as_typed_value(stages)
    assert text == "[{from_step:3,weights:{en:0.5,code:null}}]"
    (override,) = OverridesParser.create().parse_overrides([f"data.stages={text}"])
    assert override.value() == stages
    assert [as_typed_value(value) for value in (None, True, 1e-5, "auto")] == [
        "null", "true", "1e-05", "auto",
    ]  # fmt: skip


def test_a_setting_that_is_not_there_has_its_default(tmp_path: Path) -> None:
    now = as_plain(tiny_config(tmp_path, shards=tmp_path))
    old = as_plain(tiny_config(tmp_path, shards=tmp_path))
    del old["model"]["router"]["normalize_gates"], old["optim"]["betas"], old["data"]["stages"]
    del old["seed"], old["schedule"]["decay_fraction"], old["data"]["mask_documents"]
    assert changes(old, now) == []
    del old["model"]["router"]
    assert [str(change) for change in changes(old, now)] == [
        "model.router.bias_update_rate 0.0 → 0.001"
    ]


def test_other_ranks_are_another_layout_and_nothing_else(tmp_path: Path) -> None:
    one = as_plain(tiny_config(tmp_path, shards=tmp_path))
    two = as_plain(tiny_config(tmp_path, shards=tmp_path, num_workers=2))
    found = changes(one, two)
    assert found
    assert {change.kind for change in found} == {Kind.layout}
