"""Parameter counts against the published ones, the presets and the module itself."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moetrain.model import (
    Transformer,
    active_parameters,
    total_parameters,
    training_flops_per_token,
)
from moetrain.settings import ModelSettings
from tests.support.transformers_oracle import oracle_for

PRESETS = Path(__file__).parents[2] / "conf" / "model"

# Mixtral paper (arXiv 2401.04088) table 1 and the published config.json files; the totals equal
# a meta-device transformers MixtralForCausalLM / MistralForCausalLM.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
        "ffn_hidden_dim": 14336, "num_experts": 1, "top_k": 1, "vocab_size": 32000,
        "max_seq_len": 8192, "rope_theta": 10000.0, "norm_eps": 1e-5,
        "total": 7241732096, "active": 7241732096,
    },
    "8x7b": {
        "dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
        "ffn_hidden_dim": 14336, "num_experts": 8, "top_k": 2, "vocab_size": 32000,
        "max_seq_len": 32768, "rope_theta": 1000000.0, "norm_eps": 1e-5,
        "total": 46702792704, "active": 12879925248,
    },
    "16x7b": {
        "dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
        "ffn_hidden_dim": 14336, "num_experts": 16, "top_k": 2, "vocab_size": 32000,
        "max_seq_len": 32768, "rope_theta": 1000000.0, "norm_eps": 1e-5,
        "total": 91800997888, "active": 12880973824,
    },
    "8x22b": {
        "dim": 6144, "num_layers": 56, "num_heads": 48, "num_kv_heads": 8, "head_dim": 128,
        "ffn_hidden_dim": 16384, "num_experts": 8, "top_k": 2, "vocab_size": 32768,
        "max_seq_len": 65536, "rope_theta": 1000000.0, "norm_eps": 1e-5,
        "total": 140630071296, "active": 39161468928,
    },
    # The paper's tables and the published config.json; total as of a meta-device OlmoeForCausalLM.
    "olmoe-1b-7b": {
        "dim": 2048, "num_layers": 16, "num_heads": 16, "num_kv_heads": 16, "head_dim": 128,
        "ffn_hidden_dim": 1024, "num_experts": 64, "top_k": 8, "vocab_size": 50304,
        "max_seq_len": 4096, "rope_theta": 10000.0, "norm_eps": 1e-5, "qk_norm": True,
        "total": 6919161856, "active": 1282017280,
    },
    # arXiv 2401.06066, section 5.1.2, and the published config.json: 16.4 B, about 2.8 B active.
    "deepseek-moe-16b": {
        "dim": 2048, "num_layers": 28, "num_heads": 16, "num_kv_heads": 16, "head_dim": 128,
        "ffn_hidden_dim": 1408, "num_experts": 64, "top_k": 6, "vocab_size": 102400,
        "max_seq_len": 4096, "rope_theta": 10000.0, "norm_eps": 1e-6, "num_shared_experts": 2,
        "num_dense_layers": 1, "dense_ffn_hidden_dim": 10944,
        "total": 16375728128, "active": 2828650496,
    },
    # arXiv 2505.09388, table 2, and the published config.json: 30.5 B, 3.3 B active.
    "qwen3-30b-a3b": {
        "dim": 2048, "num_layers": 48, "num_heads": 32, "num_kv_heads": 4, "head_dim": 128,
        "ffn_hidden_dim": 768, "num_experts": 128, "top_k": 8, "vocab_size": 151936,
        "max_seq_len": 40960, "rope_theta": 1000000.0, "norm_eps": 1e-6, "qk_norm": True,
        "qk_norm_scope": "head", "total": 30532122624, "active": 3353032704,
    },
    # arXiv 2508.06471, table 1, and the published config.json: 106 B, 12 B active.
    "glm-4.5-air": {
        "dim": 4096, "num_layers": 46, "num_heads": 96, "num_kv_heads": 8, "head_dim": 128,
        "ffn_hidden_dim": 1408, "num_experts": 128, "top_k": 8, "vocab_size": 151552,
        "max_seq_len": 131072, "rope_theta": 1000000.0, "norm_eps": 1e-5,
        "attention_bias": True, "partial_rotary_factor": 0.5, "num_shared_experts": 1,
        "num_dense_layers": 1, "dense_ffn_hidden_dim": 10944,
        "total": 106852245504, "active": 13424123904,
    },
}  # fmt: skip


def preset(name: str) -> ModelSettings:
    return ModelSettings(**yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_shape_and_parameter_counts(name: str) -> None:
    settings, published = preset(name), dict(PUBLISHED[name])
    assert total_parameters(settings) == published.pop("total")
    assert active_parameters(settings) == published.pop("active")
    assert {
        f.name: getattr(settings, f.name) for f in fields(settings)
    }.items() >= published.items()


@pytest.mark.parametrize(
    "name", ["olmoe-1b-7b", "deepseek-moe-16b", "qwen3-30b-a3b", "glm-4.5-air"]
)
def test_totals_equal_transformers_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        oracle = oracle_for(preset(name))
    gates = [n for n, _ in oracle.named_parameters() if "shared_expert_gate" in n]  # not ours
    assert bool(gates) == (name == "deepseek-moe-16b")
    counted = sum(p.numel() for n, p in oracle.named_parameters() if n not in gates)
    assert counted == PUBLISHED[name]["total"]


@pytest.mark.parametrize("name", sorted(p.stem for p in PRESETS.glob("*.yaml")))
def test_counts_from_settings_equal_the_module_on_the_meta_device(name: str) -> None:
    settings = preset(name)
    with torch.device("meta"):
        model = Transformer(settings)
    assert sum(p.numel() for p in model.parameters()) == total_parameters(settings)
    # Active: all that isn't an expert, and top_k of each layer's experts.
    idle = sum(
        p.numel() * (settings.num_experts - settings.top_k) // settings.num_experts
        for p in model.parameters()
        if p.ndim == 3
    )
    assert active_parameters(settings) == total_parameters(settings) - idle


def test_training_flops_count_three_passes_over_active_matrices_and_causal_attention() -> None:
    settings = preset("8x7b")
    matrices = active_parameters(settings) - 32000 * 4096
    scores_and_sums = 2 * 2 * 4096 * (4096 / 2)  # two products over half the positions, a layer
    expected = 6 * matrices + 3 * 32 * scores_and_sums
    assert training_flops_per_token(settings, seq_len=4096) == pytest.approx(expected)
