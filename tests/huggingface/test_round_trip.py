"""Hugging Face to ours and back: no bit changes, whatever form the folder has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moetrain.model import Transformer
from moetrain.settings import ModelSettings
from tests.support.huggingface_folders import (
    FAMILIES,
    TINY,
    assert_bitwise_equal,
    exported,
    imported,
    loaded,
    save_oracle,
    tensors_in,
    write_run,
)

FORMS: dict[str, dict[str, Any]] = {
    "experts by themselves, one file": {},
    "experts by themselves, sharded": {"max_shard_size": "5KB"},
    "fused experts, one file": {"save_original_format": False},
    "fused experts, sharded": {"save_original_format": False, "max_shard_size": "5KB"},
}


@torch.no_grad()
def fill_with_any_bits(model: nn.Module) -> None:
    """Gives every weight random bits: subnormal, -0.0, huge and tiny numbers among them.

    But a gate of shared experts stays 0, and what it halves, and is doubled for it, keeps a normal
    size.
    """
    for name, weight in model.named_parameters():
        if "shared_expert_gate" in name or "shared_expert.down_proj" in name:
            continue
        bits = torch.int32 if weight.itemsize == 4 else torch.int16
        low = torch.iinfo(bits).min
        drawn = torch.randint(low, -low, weight.shape, dtype=bits).view(weight.dtype)
        weight.copy_(torch.where(drawn.isfinite(), drawn, -0.0))


@pytest.mark.trap(15)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face_to_ours_and_back_changes_no_bit(
    tmp_path: Path, name: str, form: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    settings = FAMILIES[name]
    theirs = save_oracle(tmp_path / "first", settings, dtype=dtype)
    fill_with_any_bits(theirs)
    theirs.save_pretrained(tmp_path / "theirs", **FORMS[form])
    is_sharded = "max_shard_size" in FORMS[form]
    assert (tmp_path / "theirs" / "model.safetensors").exists() != is_sharded
    theirs.save_pretrained(tmp_path / "published")

    checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    exported(checkpoint, tmp_path / "ours", settings)
    assert_bitwise_equal(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "published"))


@pytest.mark.parametrize("name", FAMILIES)
def test_ours_to_hugging_face_and_back_changes_no_bit(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    settings = FAMILIES[name]
    first = write_run(tmp_path / "run", _random(settings), mesh={"compute_dtype": "float32"})
    exported(first, tmp_path / "theirs", settings, max_shard_bytes=4000)
    second = imported(tmp_path / "theirs", tmp_path / "again")
    assert_bitwise_equal(
        loaded(second, settings).state_dict(), loaded(first, settings).state_dict()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_routers_keep_their_precision_in_a_bfloat16_export(tmp_path: Path, name: str) -> None:
    """A rounded router chooses other experts."""
    torch.manual_seed(0)
    settings = FAMILIES[name]
    first = write_run(tmp_path / "run", _random(settings), mesh={"compute_dtype": "bfloat16"})
    exported(first, tmp_path / "theirs", settings)
    stored = tensors_in(tmp_path / "theirs")
    exact = {n for n, tensor in stored.items() if tensor.dtype == torch.float32}
    assert exact == {n for n in stored if n.endswith((".gate.weight", "e_score_correction_bias"))}
    second = imported(tmp_path / "theirs", tmp_path / "again")
    ours, back = loaded(first, settings), loaded(second, settings)
    for moe, again in zip(ours.moe_layers(), back.moe_layers(), strict=True):
        assert_bitwise_equal(moe.router.state_dict(), again.router.state_dict())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [1 << 40, 4000])
def test_transformers_loads_an_export_whole_with_equal_logits(
    tmp_path: Path, name: str, max_shard_bytes: int
) -> None:
    from tests.model.test_transformer import tolerance

    torch.manual_seed(0)
    settings = FAMILIES[name]
    model = _random(settings)
    run = write_run(tmp_path / "run", model, mesh={"compute_dtype": "float32"})
    files = exported(run, tmp_path / "theirs", settings, max_shard_bytes=max_shard_bytes)
    assert (len(files) > 3) == (max_shard_bytes == 4000)
    sizes = [sum(t.nbytes for t in _tensors(tmp_path / "theirs" / f)) for f in files]
    alone = [len(_tensors(tmp_path / "theirs" / f)) == 1 for f in files]
    assert all(s <= max_shard_bytes or a for s, a in zip(sizes, alone, strict=True))

    theirs, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(found.values()), found  # missing, unexpected, mismatched keys and errors
    assert theirs.dtype == torch.float32
    assert theirs.config.bos_token_id is theirs.config.eos_token_id is None
    tokens = torch.randint(0, settings.vocab_size, (3, 37))
    with torch.no_grad():
        ours, expected = model(tokens), theirs(tokens).logits
    assert (ours - expected).norm() / expected.norm() < tolerance(settings)


def test_an_export_says_both_what_old_and_new_transformers_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", _random(TINY), mesh={"compute_dtype": "bfloat16"})
    exported(run, tmp_path / "theirs", TINY, bos_token_id=1, eos_token_id=2, max_shard_bytes=4000)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e4
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    generation = json.loads((tmp_path / "theirs" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    tensors = tensors_in(tmp_path / "theirs")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    routers = {name for name in tensors if name.endswith(".gate.weight")}
    assert {n for n, t in tensors.items() if t.dtype != torch.bfloat16} == routers
    with safe_open(tmp_path / "theirs" / next(iter(index["weight_map"].values())), "pt") as file:
        assert file.metadata() == {"format": "pt"}, "version 4 refuses a file without"
    assert "model.layers.1.block_sparse_moe.experts.2.w1.weight" in tensors, "as published"


def _random(settings: ModelSettings) -> Transformer:
    model = Transformer(settings)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    for moe in model.moe_layers():
        if settings.router.score_function == "sigmoid":
            moe.router.bias.normal_(std=0.2)
    return model.eval()


def _tensors(path: Path) -> list[Tensor]:
    return list(load_file(path).values())
