"""What export refuses and says, and that it needs memory for a few tensors only."""

import dataclasses
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetrain.checkpoint.manifest import read_manifest
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.checks import ConfigError
from moetrain.export import ExportSettings, export
from moetrain.huggingface.configuration import config_json
from moetrain.huggingface.model_files import export_dtype, exportable_places
from moetrain.huggingface.names import (
    ConversionError,
    TensorPlace,
    model_tensors,
    places,
    require_complete,
)
from moetrain.huggingface.new_folder import new_folder
from moetrain.model import Transformer
from moetrain.settings import ModelSettings
from tests.support.huggingface_folders import (
    TINY,
    assert_bitwise_equal,
    exported,
    imported,
    save_oracle,
    tensors_in,
    write_run,
)

DENSE = dataclasses.replace(TINY, num_experts=1, top_k=1)


def _random(settings: ModelSettings) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(settings)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def _exportable(checkpoint: Path, *, drop_router_bias: bool = False) -> list[TensorPlace]:
    with CheckpointReader(checkpoint) as reader:
        return exportable_places(reader, TINY, drop_router_bias=drop_router_bias)


def test_a_selection_bias_is_refused_unless_it_may_be_dropped(tmp_path: Path) -> None:
    model = _random(TINY)
    model.moe_layers()[1].router.bias[2] = -0.25
    checkpoint = write_run(tmp_path / "run", model)
    with pytest.raises(
        ConfigError, match=r"layers\.1\.feed_forward\.router\.bias is -0\.25 for exp"
    ):
        _exportable(checkpoint)
    assert _exportable(checkpoint, drop_router_bias=True) == list(places(TINY))


@pytest.mark.trap(15)
@pytest.mark.parametrize("change", ["more", "fewer", "another shape"])
def test_a_tensor_more_or_less_than_the_model_has_is_refused(tmp_path: Path, change: str) -> None:
    model, name = _random(TINY), "layers.1.feed_forward.router.weight"
    extra = {"model.layers.1.attention.q_norm.weight": torch.ones(40)} if change == "more" else {}
    router = model.moe_layers()[1].router
    if change == "fewer":
        router.register_parameter("weight", None)
    elif change == "another shape":
        router.weight = torch.nn.Parameter(torch.ones(24, 3))
    checkpoint = write_run(tmp_path / "run", model, extra=extra)
    with pytest.raises(ConversionError) as error:
        _exportable(checkpoint)
    assert ("q_norm.weight is in the checkpoint" if change == "more" else name) in str(error.value)


@pytest.mark.trap(15)
@pytest.mark.parametrize("settings", [TINY, DENSE], ids=["mixtral", "mistral"])
def test_every_tensor_has_one_place_and_only_one(settings: ModelSettings) -> None:
    tensors, placed = model_tensors(settings), list(places(settings))
    require_complete(placed, tensors)
    assert len({place.theirs for place in placed}) == len(placed)
    for left_out in range(len(placed)):
        with pytest.raises(ConversionError, match="has no place") as error:
            require_complete(placed[:left_out] + placed[left_out + 1 :], tensors)
        assert placed[left_out].ours in str(error.value)
    with pytest.raises(ConversionError, match="comes twice"):
        require_complete([*placed, placed[3]], tensors)


@pytest.mark.parametrize(
    ("state", "mesh", "dtype"),
    [
        ({"imported_dtype": "float16"}, {"compute_dtype": "bfloat16"}, "float16"),
        ({"imported_dtype": None}, {"compute_dtype": "bfloat16"}, "bfloat16"),
        ({}, {"compute_dtype": "float32"}, "float32"),
        ({}, {}, "float32"),
    ],
)
def test_the_dtype_is_that_of_the_import_or_of_the_run(
    tmp_path: Path, state: Mapping[str, str], mesh: Mapping[str, str], dtype: str
) -> None:
    manifest = read_manifest(write_run(tmp_path / "run", _random(TINY), state=state, mesh=mesh))
    assert export_dtype("auto", manifest) == dtype
    assert export_dtype("bfloat16", manifest) == "bfloat16"


@pytest.mark.parametrize(
    ("value", "message"), [(1e5, "float16 can't hold: 100000"), (torch.nan, "has NaN")]
)
def test_a_number_that_the_dtype_has_not_is_refused(
    tmp_path: Path, value: float, message: str
) -> None:
    model = _random(TINY)
    with torch.no_grad():
        model.moe_layers()[0].experts.down[1, 3, 5] = value
    checkpoint = write_run(tmp_path / "run", model)
    with pytest.raises(ConversionError, match=message) as error:
        exported(checkpoint, tmp_path / "theirs", TINY, dtype="float16")
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in str(error.value)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:

    def interrupted() -> None:
        with new_folder(tmp_path / "a" / "to") as staged:
            (staged / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list((tmp_path / "a").iterdir())
    with new_folder(tmp_path / "a" / "to") as staged:
        (staged / "whole").touch()
        assert not (tmp_path / "a" / "to").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["to"]
    assert [p.name for p in (tmp_path / "a" / "to").iterdir()] == ["whole"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "nowhere"}, "run=nowhere: is no folder here"),
        ({"step": 8}, "step=8: "),
        ({"to": "run"}, "to=run: is there already"),
        ({"to": "run/config/x"}, "run/config is no folder"),
    ],
)
def test_a_bad_setting_ends_the_command_with_nothing_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str | int],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", _random(TINY))
    (tmp_path / "run" / "config").touch()
    values: dict[str, Any] = {"run": "run", "to": "theirs", **change}
    settings = ExportSettings(**values)
    assert export(settings) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_is_passed_over_or_refused_where_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_run(tmp_path / "run", _random(TINY))
    path = checkpoint / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    settings = ExportSettings(run=str(tmp_path / "run"), to=str(tmp_path / "theirs"))
    assert export(settings) == 2
    error = capsys.readouterr().err
    assert "passing over step_00000007: " in error
    assert "has no good checkpoint" in error
    assert export(dataclasses.replace(settings, step=7)) == 1
    assert f"{path} does not have the hash" in capsys.readouterr().err


LARGE = ModelSettings(
    dim=512, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, ffn_hidden_dim=2048,
    num_experts=8, top_k=2, vocab_size=1000, max_seq_len=64, rope_theta=1e4,
)  # fmt: skip
MATRIX = 4 * LARGE.dim * LARGE.ffn_hidden_dim
CHILD = """
import sys
from pathlib import Path
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.huggingface.model_files import exportable_places, write_model
from moetrain.import_hf import ImportSettings, import_folder

def import_as(name, run):
    assert import_folder(ImportSettings(from_=name, to=run)) == 0

def export_as(run, to):
    Path(to).mkdir()
    with CheckpointReader(Path(run, "checkpoints/step_00000000")) as reader:
        config = reader.manifest.config["model"]
        from moetrain.settings.validation import validated
        from moetrain.settings import ModelSettings
        model = validated(config, ModelSettings)
        placed = exportable_places(reader, model, drop_router_bias=False)
        write_model(Path(to), reader, model=model, placed=placed, dtype="bfloat16",
                    max_shard_bytes=60_000_000, bos_token_id=1, eos_token_id=2,
                    advance=lambda _: None)

import_as("small", "warm")
export_as("warm", "warm-out")
for work in (lambda: import_as("theirs", "run"), lambda: export_as("run", "out")):
    print("ready", flush=True)
    sys.stdin.readline()
    work()
    print("done", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_a_few_tensors_whatever_the_size_of_the_model(tmp_path: Path) -> None:
    """Memory of a process's own, sampled while it works; files mapped into it are not counted."""
    torch.manual_seed(0)
    drawn = torch.randn(LARGE.ffn_hidden_dim * LARGE.dim).bfloat16()
    for settings, name in ((LARGE, "theirs"), (TINY, "small")):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {p.theirs: _shaped(drawn, p) for p in places(settings)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = config_json(settings, dtype="bfloat16", bos_token_id=None, eos_token_id=None)
        (folder / "config.json").write_text(json.dumps(config))
    model = 2 * sum(torch.Size(shape).numel() for shape in model_tensors(LARGE).values())
    assert model > 100e6

    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        cwd=tmp_path,
        # What is freed goes back at once, and isn't there for the next to be taken from.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin
    try:
        import_peak, export_peak = _peaks(child), _peaks(child)
    finally:
        child.kill()
        child.wait()
    # A matrix as it was saved, whether its numbers are finite, it rounded, and it as a row of
    # bytes, together with what a process takes for other things.
    assert export_peak < 4 * MATRIX
    # A stack of experts goes into our file at once (up to 256 MiB), and what goes into it.
    assert import_peak < (LARGE.num_experts + 4) * MATRIX
    assert max(export_peak, import_peak) < model


def _shaped(drawn: torch.Tensor, place: TensorPlace) -> torch.Tensor:
    return drawn[: torch.Size(place.theirs_shape).numel()].reshape(place.theirs_shape).clone()


def _peaks(child: "subprocess.Popen[str]") -> int:
    """Returns how many bytes more than before a child has of its own while it works, at most."""
    assert child.stdin
    assert child.stdout
    while (line := child.stdout.readline().strip()) != "ready":
        assert line or child.poll() is None, "the child died"
    before = peak = _own_bytes(child.pid)
    child.stdin.write("\n")
    child.stdin.flush()
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while not selector.select(0.001):
            peak = max(peak, _own_bytes(child.pid))
    while (line := child.stdout.readline().strip()) != "done":
        assert line or child.poll() is None, "the child died"
    child.stdin.write("\n")
    child.stdin.flush()
    return peak - before


def _own_bytes(pid: int) -> int:
    status = Path("/proc", str(pid), "status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def test_an_import_without_a_tokenizer_is_exported_again_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one with an embedding padded beyond what any tokenizer has."""
    theirs, again = tmp_path / "theirs", tmp_path / "again"
    save_oracle(theirs, TINY, dtype=torch.bfloat16)
    config = json.loads((theirs / "config.json").read_text())
    change = {"bos_token_id": 5, "eos_token_id": [6, 7], "router_aux_loss_coef": 0.02}
    (theirs / "config.json").write_text(json.dumps(config | change))
    imported(theirs, tmp_path / "run")
    assert "carried   router_aux_loss_coef=0.02 as " in capsys.readouterr().out
    run = str(tmp_path / "run")
    assert export(ExportSettings(run=run, to=str(again))) == 2
    assert "or none to export none" in capsys.readouterr().err
    assert export(ExportSettings(run=run, to=str(again), tokenizer="none")) == 0
    assert_bitwise_equal(tensors_in(again), tensors_in(theirs))
    made = json.loads((again / "config.json").read_text())
    assert {name: made[name] for name in change} == change
    assert not list(again.glob("*token*"))
    assert "AutoTokenizer" not in (again / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(again).config.vocab_size == TINY.vocab_size


def test_the_command_makes_a_folder_that_imports_and_exports_as_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(TINY, vocab_size=257)
    write_run(tmp_path / "run", _random(settings), mesh={"compute_dtype": "bfloat16"})
    first, second = tmp_path / "first", tmp_path / "second"
    run = ExportSettings(run=str(tmp_path / "run"), to=str(first), tokenizer="bytes")
    assert export(run) == 0
    out = capsys.readouterr().out
    assert "step_00000007 as MixtralForCausalLM: " in out
    assert "of bfloat16" in out
    assert str(first) in out
    imported(first, tmp_path / "again")
    assert export(ExportSettings(run=str(tmp_path / "again"), to=str(second))) == 0
    assert_bitwise_equal(tensors_in(second), tensors_in(first))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert AutoTokenizer.from_pretrained(second)("ab").input_ids == [97, 98]
