"""What import_hf refuses and says; damaged and hostile folders leave nothing behind."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moetrain.checkpoint.manifest import read_manifest, verify_files
from moetrain.checkpoint.offline import write_checkpoint
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.huggingface.run_folder import model_name
from moetrain.import_hf import ImportSettings, import_folder
from moetrain.model import total_parameters
from moetrain.settings import Config, ModelSettings
from moetrain.settings.validation import validated
from tests.support.huggingface_folders import TINY, imported, loaded, save_oracle, tensors_in
from tests.support.runs import write_shards

INDEX = "model.safetensors.index.json"
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of folders: one model, saved in each form."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    save_oracle(folder / "whole", TINY)
    save_oracle(folder / "sharded", TINY, max_shard_size="5KB")
    save_oracle(folder / "fused", TINY, save_original_format=False)
    return folder


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Returns a change of the tensors in a folder's one file."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def with_map(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / INDEX, lambda index: change(index["weight_map"]))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard(folder: Path, number: int) -> Path:
    return next(folder.glob(f"model-{number:05d}-of-*.safetensors"))


def leave_a_dangling_link(folder: Path) -> None:
    shard(folder, 3).unlink()
    (folder / "model-00003-of-99999.safetensors").symlink_to("x")


def truncate(folder: Path) -> None:
    path = shard(folder, 2)
    os.truncate(path, path.stat().st_size - 8)


def first_shard_twice(folder: Path) -> None:
    """A file of another shard's tensors under its name."""
    shutil.copyfile(shard(folder, 1), shard(folder, 2))


def one_tensor_twice(folder: Path) -> None:
    """With an index that names the second of the two."""
    first, *_, last = (p for p in sorted(folder.glob("model-*")) if len(load_file(p)) > 1)
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor + 1}, last)
    with_map(lambda m: m.update({name: last.name}))(folder)


def only_first_shard(folder: Path) -> None:
    for path in sorted(folder.glob("model-*"))[1:]:
        path.unlink()


def git_lfs_pointer(folder: Path) -> None:
    shard(folder, 2).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


DAMAGED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a tensor is missing": ("whole", with_tensors(lambda t: t.pop(W1)), f"no tensor {W1}"),
    "one too many": (
        "whole",
        with_tensors(lambda t: t.update({"model.layers.2.x.weight": torch.zeros(1)})),
        "model.layers.2.x.weight has no place in this model",
    ),
    "a bias of attention": (
        "whole",
        with_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(40)})),
        "model.layers.0.self_attn.q_proj.bias has no place",
    ),
    "a matrix the other way up": (
        "whole",
        with_tensors(lambda t: t.update({W1: t[W1].t().contiguous()})),
        f"{W1} has the shape [24, 16], and config.json makes it [16, 24]",
    ),
    "an expert more": (
        "fused",
        with_tensors(lambda t: t.update({GATE_UP: torch.zeros(4, 32, 24)})),
        f"{GATE_UP} has the shape [4, 32, 24], and config.json makes it [3, 32, 24]",
    ),
    "both forms at once": (
        "fused",
        with_tensors(lambda t: t.update({W1: torch.zeros(16, 24)})),
        f"{W1} has no place",
    ),
    "not a number": (
        "whole",
        with_tensors(lambda t: t[W1].fill_(torch.nan)),
        f"{W1} has NaN or infinity",
    ),
    "infinity in a fused stack": (
        "fused",
        with_tensors(lambda t: t[GATE_UP][2, 31].fill_(torch.inf)),
        f"{GATE_UP} has NaN or infinity",
    ),
    "quantised weights": (
        "whole",
        with_tensors(lambda t: t.update({W1: torch.zeros(16, 24, dtype=torch.int8)})),
        f"{W1} is of dtype I8",
    ),
    "shards that were not fetched": (
        "sharded",
        only_first_shard,
        f"files that {INDEX} lists; there: model-00001-of-",
    ),
    "shards without their index": (
        "sharded",
        lambda f: (f / INDEX).unlink(),
        f"has no {INDEX}, which says what is in which of its files; there: model-00001-of-",
    ),
    "a dangling link, as of a cache": (
        "sharded",
        leave_a_dangling_link,
        "; missing: model-00003-of-",
    ),
    "a pointer of Git LFS": ("sharded", git_lfs_pointer, "run git lfs pull in that folder"),
    "pickles alone": ("whole", only_pickles, "pytorch_model.bin and no safetensors"),
    "no weights": ("whole", lambda f: (f / "model.safetensors").unlink(), "has neither"),
    "a file that is no safetensors": (
        "whole",
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        "model.safetensors can't be read",
    ),
    "a shard cut short": ("sharded", truncate, ".safetensors can't be read"),
    "a missing shard": (
        "sharded",
        lambda f: shard(f, 2).unlink(),
        "; missing: model-00002-of-",
    ),
    "a shard of other tensors": ("sharded", first_shard_twice, "is in model-0000"),
    "a tensor in two shards": ("sharded", one_tensor_twice, " and in model-000"),
    "an index that leaves a tensor out": ("sharded", with_map(lambda m: m.pop(W1)), f"{W1} is in"),
    "an index that has one too many": (
        "sharded",
        with_map(lambda m: m.update(other=m[W1])),
        "says that other is in",
    ),
    "an index that leaves the folder": (
        "sharded",
        with_map(lambda m: m.update({W1: "../../secret.safetensors"})),
        "names '../../secret.safetensors'",
    ),
    "an index that is no index": (
        "sharded",
        lambda f: (f / INDEX).write_text("[]"),
        f"{INDEX} can't be read",
    ),
    "no config.json": (
        "whole",
        lambda f: (f / "config.json").unlink(),
        "config.json can't be read",
    ),
    "a million layers claimed": (
        "whole",
        lambda f: change_json(f / "config.json", lambda c: c.update(num_hidden_layers=10**9)),
        "no tensor model.layers.2.input_layernorm.weight",
    ),
}


@pytest.mark.trap(15)
@pytest.mark.parametrize("name", DAMAGED)
def test_a_folder_that_is_not_whole_is_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    form, damage, message = DAMAGED[name]
    shutil.copytree(saved / form, tmp_path / "theirs")
    damage(tmp_path / "theirs")
    settings = ImportSettings(from_=str(tmp_path / "theirs"), to=str(tmp_path / "run"))
    assert import_folder(settings) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"moetrain.import_hf: from={tmp_path / 'theirs'}: ")
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"], "nothing else is left"


def test_a_folder_that_is_taken_is_left_as_it_is(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    settings = ImportSettings(from_=str(saved / "whole"), to=str(tmp_path / "run"))
    assert import_folder(settings) == 2
    assert "is there already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_an_imported_run_has_what_a_run_has(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved / "whole", tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "theirs" / name).write_text("{}")
    (tmp_path / "theirs" / "consolidated.safetensors").touch()
    run = tmp_path / "run"
    (tmp_path / "run").mkdir()  # an empty one will do
    checkpoint = imported(tmp_path / "theirs", run)
    out = capsys.readouterr().out
    assert f"{total_parameters(TINY):,} parameters" in out
    assert "consolidated.safetensors" in out

    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest)
    assert not any(name.startswith("optimizer.") for name in manifest.tensors)
    assert manifest.state == {
        "step": 0, "samples": 0, "tokens": 0, "imported_dtype": "float32",
        "imported_token_ids": {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    }  # fmt: skip
    config = validated(yaml.safe_load((run / "config.yaml").read_text()), Config)
    assert config.model == TINY
    assert (config.run.dir, config.run.name) == (str(tmp_path), "run")
    assert config.data.tokenizer == str(run / "tokenizer")
    assert {p.name for p in (run / "tokenizer").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
    }  # fmt: skip
    assert [event["event"] for event in _events(run)] == ["import"]
    assert (run / "checkpoints" / "latest").read_text().strip() == checkpoint.name
    assert (run.stat().st_mode & 0o777) == (tmp_path / "theirs").stat().st_mode & 0o777


def test_a_tied_head_stays_tied(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved / "whole", tmp_path / "theirs")
    change_json(tmp_path / "theirs" / "config.json", lambda c: c.update(tie_word_embeddings=True))
    settings = ImportSettings(from_=str(tmp_path / "theirs"), to=str(tmp_path / "run"))
    assert import_folder(settings) == 2, "there is a head, and it isn't the embedding"
    assert "which of them is the head" in capsys.readouterr().err

    with_tensors(lambda t: t.pop("lm_head.weight"))(tmp_path / "theirs")
    checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    model = loaded(checkpoint, replace(TINY, tie_embeddings=True))
    embedding = tensors_in(tmp_path / "theirs")["model.embed_tokens.weight"]
    assert torch.equal(model.embedding.weight, embedding)
    # Some write the head all the same.
    with_tensors(lambda t: t.update({"lm_head.weight": embedding}))(tmp_path / "theirs")
    shutil.rmtree(tmp_path / "run")
    again = loaded(imported(tmp_path / "theirs", tmp_path / "run"), model.settings)
    assert torch.equal(again.embedding.weight, embedding)


def test_weights_of_several_dtypes_come_back_in_the_one_that_holds_all(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved / "whole", tmp_path / "theirs")
    with_tensors(lambda t: t.update({W1: t[W1].bfloat16()}))(tmp_path / "theirs")
    checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    assert "bfloat16 and float32" in capsys.readouterr().out
    assert read_manifest(checkpoint).state["imported_dtype"] == "float32"
    with CheckpointReader(checkpoint) as reader:
        gate = reader.read("model.layers.1.feed_forward.experts.gate")[2]
    assert torch.equal(gate, tensors_in(tmp_path / "theirs")[W1].float())


def test_a_stack_that_is_asked_for_by_rows_is_put_together_again(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = imported(saved / "fused", tmp_path / "whole")
    defaults = write_checkpoint.__kwdefaults__
    assert defaults is not None
    assert "max_piece_bytes" in defaults
    monkeypatch.setitem(defaults, "max_piece_bytes", 2000)
    pieces = imported(saved / "fused", tmp_path / "pieces")
    first, second = loaded(whole, TINY).state_dict(), loaded(pieces, TINY).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_command_that_is_printed_trains_the_model_on(tmp_path: Path) -> None:
    """With a rate so small that one step leaves the weights as they were imported."""
    settings = ModelSettings(**{**vars(TINY), "vocab_size": 300})  # padded: bytes have 257
    torch.manual_seed(0)
    save_oracle(tmp_path / "theirs", settings)
    shards = write_shards(tmp_path)

    def run(command: list[str]) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    python = [sys.executable, "-m"]
    out = run([*python, "moetrain.import_hf", "from=theirs", "to='my run, 8x7b'"])
    (line,) = (line for line in out.splitlines() if line.startswith("next"))
    words = shlex.split(line.removeprefix("next"))
    assert words[0] == "python"
    assert words[-1] == "data.dir=SHARDS"
    tiny = [
        "train.num_steps=1", "train.global_batch_size=4", "schedule.warmup_steps=0", "seed=5",
        "train.seq_len=32", "optim.lr=1e-12", "train.validation_sequences=4", "run.device=cpu",
        "launch.mode=inline", "observe.wandb.mode=disabled",
    ]  # fmt: skip
    run([sys.executable, *words[1:-1], f"data.dir={shards}", *tiny])
    checkpoint = tmp_path / "my run, 8x7b" / "checkpoints" / "step_00000001"
    manifest = read_manifest(checkpoint)
    assert manifest.state["imported_dtype"] == "float32"
    assert manifest.state["samples"] == 4
    trained = loaded(checkpoint, settings).state_dict()
    first = loaded(checkpoint.with_name("step_00000000"), settings).state_dict()
    for name, weight in trained.items():
        torch.testing.assert_close(weight, first[name], rtol=0, atol=1e-11)
    kinds = [event["event"] for event in _events(checkpoint.parents[1])]
    assert kinds[0] == "import"
    assert "data_order" not in kinds, "no sample had been drawn in another order"


def _events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("mine", "mine"),
        ("toy", "imported-toy"),
        ("8x7b-base", "imported-8x7b-base"),
        ("a run, of mine", "a-run-of-mine"),
        ("...", "model"),
    ],
)
def test_a_model_takes_no_name_that_moetrain_has_a_model_of(folder: str, name: str) -> None:
    assert model_name(Path("/runs", folder)) == name
