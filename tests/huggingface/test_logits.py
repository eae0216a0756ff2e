"""An imported model computes what transformers computes, to rounding, at shapes drawn at random."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moetrain.model import Transformer
from moetrain.settings import ModelSettings, RouterSettings
from tests.model.test_transformer import tolerance
from tests.support.huggingface_folders import imported, loaded, save_oracle

NUM_SHAPES = 15
GROUPS = (1, 2, 8)
PER_HEAD: dict[str, Any] = {"qk_norm": True, "qk_norm_scope": "head"}
BIASES: dict[str, Any] = {"attention_bias": True, "attention_output_bias": True}
UNNORMALISED = RouterSettings(normalize_gates=False)
SIGMOID = RouterSettings(score_function="sigmoid", routed_scaling_factor=2.5)
# What the other classes of transformers have, by their model_type; a dense first layer is added.
KINDS: dict[str, dict[str, Any]] = {
    "olmoe": {"qk_norm": True, "clip_qkv": 2.0, "router": UNNORMALISED},
    "qwen3_moe": PER_HEAD | {"router": UNNORMALISED},
    "qwen2_moe": {"num_shared_experts": 1, "attention_bias": True, "router": UNNORMALISED},
    "glm4_moe": PER_HEAD | {"num_shared_experts": 1, "attention_bias": True, "router": SIGMOID},
    "qwen2": {"attention_bias": True, "tie_embeddings": True},
    "qwen3": PER_HEAD,
    "llama with biases": BIASES,
    "qwen3 with biases": PER_HEAD | BIASES,
    "qwen3_moe with biases": PER_HEAD | BIASES,
    "olmoe with biases": {"qk_norm": True, "router": UNNORMALISED} | BIASES,
}
# Each plain shape, and of each other class three: sharing heads in each way.
CASES = [("", seed) for seed in range(NUM_SHAPES)]
CASES += [(kind, seed) for kind in KINDS for seed in range(1 if "biases" in kind else 3)]


def drawn(seed: int, kind: str = "") -> ModelSettings:
    """Returns a random shape: every third of a group size, every fifth dense."""
    draw = random.Random(seed)
    family = kind.removesuffix(" with biases")
    dense = family in ("qwen2", "qwen3", "llama") if kind else seed % 5 == 4
    kv_heads, head_dim, experts = (
        draw.choice((1, 2, 3)),
        2 * draw.randint(3, 12),
        draw.randint(2, 9),
    )
    dim = draw.choice([d for d in range(24, 80, 4) if d % head_dim])
    settings = ModelSettings(
        dim=dim,
        num_layers=draw.randint(1, 4),
        num_heads=kv_heads * GROUPS[seed % 3],
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_dim=4 * draw.randint(4, 30),
        num_experts=1 if dense else experts,
        top_k=1 if dense else draw.randint(2, experts),
        vocab_size=draw.randint(20, 200),
        max_seq_len=64,
        rope_theta=draw.choice((1e4, 1e5, 1e6)),
        norm_eps=draw.choice((1e-5, 1e-6)),
    )
    settings = replace(settings, **KINDS[kind]) if kind else settings
    if family == "olmoe":
        return replace(settings, dim=settings.num_heads * head_dim)
    if family in ("qwen2_moe", "qwen3_moe", "glm4_moe"):
        settings = replace(settings, num_layers=settings.num_layers + 1)
        return replace(settings, num_dense_layers=1, dense_ffn_hidden_dim=40)
    return settings


def test_the_shapes_are_as_different_as_they_should_be() -> None:
    shapes = [drawn(seed) for seed in range(NUM_SHAPES)]
    for dense in (True, False):
        kind = [s for s in shapes if s.is_moe != dense]
        assert {s.num_heads // s.num_kv_heads for s in kind} == set(GROUPS)
    assert all(s.dim % s.head_dim for s in shapes)
    assert len({s.top_k for s in shapes}) > 3


@pytest.mark.trap(15)
@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_logits_equal_transformers_in_float32(tmp_path: Path, kind: str, seed: int) -> None:
    """From weights saved as float32, bfloat16 and float16 in turn."""
    settings = drawn(seed, kind)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed // 3 % 3]
    ours, theirs, tokens = _both(tmp_path, settings, saved=dtype, computed=torch.float32, seed=seed)
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours(tokens)
    assert (logits - expected).norm() / expected.norm() < tolerance(settings)


@pytest.mark.trap(15)
@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_logits_equal_transformers_in_bfloat16(tmp_path: Path, kind: str, seed: int) -> None:
    """With transformers' choice of experts, from which ours differs at near-ties alone.

    transformers multiplies the router in bfloat16 and we in float32, so that a near-tie may go
    either way; a token that goes elsewhere has another output, not a rounded one.
    """
    settings = drawn(seed, kind)
    ours, theirs, tokens = _both(
        tmp_path, settings, saved=torch.bfloat16, computed=torch.bfloat16, seed=seed
    )
    # Both round what they hand on, independently: in a layer the two norms, queries, keys, values,
    # the two of rotation, scores, attention, its output, gate, silu, product, expert, weighted sum
    # and the two residuals; embedding is exact; and at the end norm and logits. Biases, norms of
    # queries and keys, and shared experts (gate, silu, product, output, sum) have theirs too. A
    # rounding is at most half an eps, and they add up as a random walk does.
    in_layer = 17 + 2 * settings.qk_norm + 3 * settings.attention_bias
    in_layer += settings.attention_output_bias
    in_layer += 5 * bool(settings.num_shared_experts)
    roundings = 2 * (in_layer * settings.num_layers + 2)
    bound = torch.finfo(torch.bfloat16).eps / 2 * roundings**0.5
    chosen: list[Tensor] = []
    for layer in theirs.model.layers if settings.is_moe else ():
        if not hasattr(layer.mlp, "gate"):
            continue  # a dense first layer
        layer.mlp.gate.register_forward_hook(lambda *args: chosen.append(args[-1][-1]))
    with torch.no_grad():
        expected = theirs(tokens).logits.float()
        replayed = iter(chosen)

        def as_theirs(scores: Tensor) -> Tensor:
            experts = next(replayed)
            ours = scores.topk(settings.top_k).values[:, -1]
            regret = ours - scores.gather(1, experts).amin(1)  # 0 where the choice is the same
            assert (regret <= 2 * bound * scores.norm(dim=1)).all(), "no near-tie"
            return experts

        for moe in ours.moe_layers():
            moe.router.select = as_theirs
        logits = ours(tokens).float()
    assert next(replayed, None) is None
    assert (logits - expected).norm() / expected.norm() < bound


def _both(
    tmp_path: Path,
    settings: ModelSettings,
    *,
    saved: torch.dtype,
    computed: torch.dtype,
    seed: int,
) -> tuple[Transformer, Any, Tensor]:
    torch.manual_seed(seed)
    save_oracle(tmp_path / "theirs", settings, dtype=saved, save_original_format=seed % 2 == 0)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs",
        dtype=computed,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    ours = loaded(imported(tmp_path / "theirs", tmp_path / "run"), settings).to(computed)
    return ours, theirs.eval(), torch.randint(0, settings.vocab_size, (2, 40))
