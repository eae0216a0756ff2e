"""An upcycled dense run: the same function at first, and a run that training continues from."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.checkpoint.manifest import TensorEntry, read_manifest, verify_files
from moetrain.checkpoint.offline import write_checkpoint
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.huggingface.model_card import write_model_card
from moetrain.huggingface.tokenizer import write_tokenizer
from moetrain.model import initial_values
from moetrain.settings import ModelSettings, Resolved
from moetrain.settings.validation import validated
from moetrain.upcycle.__main__ import UpcycleSettings, upcycle
from tests.support.huggingface_folders import loaded
from tests.support.ranks import run_ranks
from tests.support.runs import events_of, metrics_of, tiny_config, train_as_rank, write_shards

DENSE = {"model__num_experts": 1, "model__top_k": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def dense(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dense run that was trained for some steps."""
    folder = tmp_path_factory.mktemp("dense")
    config = tiny_config(folder, shards=shards, **DENSE, train__num_steps=16)
    run_ranks(train_as_rank, 1, config, None, 1)
    return folder / "runs/tiny"


def upcycled(dense: Path, to: Path, **settings: Any) -> Path:
    """Upcycles a run, and returns the one checkpoint of the run that it became."""
    chosen = {"num_experts": 4, "top_k": 2, **settings}
    assert upcycle(UpcycleSettings(from_=str(dense), to=str(to), **chosen)) == 0
    return to / "checkpoints" / "step_00000000"


def settings_of(checkpoint: Path) -> ModelSettings:
    return validated(read_manifest(checkpoint).config, Resolved).model


@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(2, 2), (4, 2), (5, 3), (4, 4)], ids=lambda value: str(value)
)
def test_the_model_begins_as_the_dense_one(
    dense: Path, tmp_path: Path, num_experts: int, top_k: int
) -> None:
    before = dense / "checkpoints/step_00000016"
    after = upcycled(dense, tmp_path / "moe", num_experts=num_experts, top_k=top_k)
    settings, old = settings_of(after), settings_of(before)
    router = replace(old.router, normalize_gates=True)
    assert settings == replace(old, num_experts=num_experts, top_k=top_k, router=router)
    tokens = torch.randint(257, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded(before, old)(tokens).float()
        logits = loaded(after, settings)(tokens).float()
    # Sums over 32 hidden units and over top_k experts, rounded otherwise, in two layers.
    bound = 2 * (32 + top_k) * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (logits - expected).abs().max() <= bound
    assert expected.std() > 100 * bound


def test_every_tensor_is_the_dense_runs_or_fresh(dense: Path, tmp_path: Path) -> None:
    before = dense / "checkpoints/step_00000016"
    after = upcycled(dense, tmp_path / "moe", seed=5)
    manifest = read_manifest(after)
    verify_files(after, manifest)
    settings = settings_of(after)
    with CheckpointReader(before) as old, CheckpointReader(after) as new:
        assert not [name for name in manifest.tensors if name.startswith("optimizer.")]
        for name in manifest.tensors:
            made = new.read(name)
            if name.endswith("router.bias"):
                expected = torch.zeros(4)
            elif name.endswith("router.weight"):
                expected = initial_values(
                    name.removeprefix("model."), (4, 32), settings=settings, seed=5,
                    device=torch.device("cpu"),
                )  # fmt: skip
            elif ".experts." in name:
                stem, _, matrix = name.rpartition(".experts.")
                one = old.read(f"{stem}.{matrix}_proj.weight")
                expected = (one.T if matrix == "down" else one).expand(4, -1, -1)
            else:
                expected = old.read(name)
            assert torch.equal(made, expected), name
    state = manifest.state
    assert (state["step"], state["tokens"], state.get("data", "")) == (0, 0, "")
    assert state["tokenizer"] == read_manifest(before).state["tokenizer"]


@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_from_where_the_dense_run_was(
    dense: Path, shards: Path, tmp_path: Path, world: int
) -> None:
    upcycled(dense, tmp_path / "runs/tiny", noise=0.01, reinitialize=0.25)
    config = tiny_config(
        tmp_path, shards=shards, num_workers=world, train__num_steps=12, optim__lr=0.003,
        parallel__expert_degree=world, checkpoint__every_steps=100,
    )  # fmt: skip
    assert run_ranks(train_as_rank, world, config, None, 1)[0].finished
    losses = [record["train/cross_entropy"] for record in metrics_of(tmp_path)]
    learned = [r["train/cross_entropy"] for r in metrics_of(dense.parents[1])]
    assert losses[0] < 0.75 * learned[0]  # what the dense model had learned is there
    assert min(losses[-3:]) < min(learned)
    assert [e["event"] for e in events_of(tmp_path)][:2] == ["upcycle", "resume"]
    records = metrics_of(tmp_path)
    assert records[-1]["router/dead_experts"] == 0


def test_the_same_numbers_come_on_any_day(dense: Path, tmp_path: Path) -> None:
    how = {"noise": 0.1, "reinitialize": 0.5, "seed": 7}
    files = [
        read_manifest(upcycled(dense, tmp_path / name, **how)).files for name in ("one", "other")
    ]
    assert files[0] == files[1]
    assert files[0] != read_manifest(upcycled(dense, tmp_path / "seed", **how | {"seed": 8})).files


def test_an_export_finds_tokenizer_and_origin(dense: Path, tmp_path: Path) -> None:
    checkpoint = upcycled(dense, tmp_path / "moe")
    manifest = read_manifest(checkpoint)
    config = validated(manifest.config, Resolved)
    before = read_manifest(dense / "checkpoints/step_00000016")
    assert manifest.config["data"] == before.config["data"]
    ids = write_tokenizer(
        tmp_path, config=config, tokenizer=None, fingerprint=manifest.state["tokenizer"],
        run_dir=tmp_path / "moe",
    )  # fmt: skip
    assert (ids.eos_token_id, ids.vocab_size) == (256, 257)
    write_model_card(
        tmp_path, run_dir=tmp_path / "moe", manifest=manifest, config=config, dtype="float32"
    )
    card = (tmp_path / "README.md").read_text()
    assert "not trained in this run yet" in card
    assert "It was upcycled from tiny" in card


def test_an_imported_runs_tokenizer_comes_along(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "checkpoints").symlink_to(dense / "checkpoints")
    (source / "tokenizer").mkdir()
    (source / "tokenizer/tokenizer.json").write_text("{}")
    upcycled(source, tmp_path / "moe")
    assert (tmp_path / "moe/tokenizer/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, "top_k=5: a token can't choose more experts than there are: use at most "
                       "num_experts=4"),
        ({"num_experts": 1, "top_k": 1}, "num_experts=1: that is the dense model"),
        ({"num_experts": 0}, "num_experts=0: an MoE has several: use 2 or more"),
        ({"top_k": 1}, "top_k=1: the only gate would always be 1"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(
    dense: Path, tmp_path: Path, settings: dict[str, Any], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chosen = {"num_experts": 4, "top_k": 2, **settings}
    assert upcycle(UpcycleSettings(from_=str(dense), to=str(tmp_path / "moe"), **chosen)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_neither_taken_for_dense_nor_written_over(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upcycled(dense, tmp_path / "moe")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "moe").rglob("*")}
    many: dict[str, Any] = {"num_experts": 4, "top_k": 2}
    assert upcycle(UpcycleSettings(from_=str(dense), to=str(tmp_path / "moe"), **many)) == 2
    assert "moe: is there already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "moe").rglob("*")} == before
    again = UpcycleSettings(from_=str(tmp_path / "moe"), to=str(tmp_path / "again"), **many)
    assert upcycle(again) == 2
    assert "its model has 4 experts already: use a dense run" in capsys.readouterr().err
    nothing = UpcycleSettings(from_=str(tmp_path), to=str(tmp_path / "again"), **many)
    assert upcycle(nothing) == 2
    assert "has no checkpoints/" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"model.norm.weight": (16,)}, "model.norm.weight is missing, or of another shape"),
        ({"model.layers.0.adapter.weight": (4,)}, "adapter.weight is no tensor of the dense model"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused(
    dense: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...] | None], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    manifest = read_manifest(dense / "checkpoints/step_00000016")
    shapes: dict[str, tuple[int, ...] | None] = {n: e.shape for n, e in manifest.tensors.items()}
    write_checkpoint(
        tmp_path / "other/checkpoints",
        step=16,
        state=manifest.state,
        config=manifest.config,
        mesh={},
        tensors={
            name: TensorEntry(shape=shape, dtype="float32")
            for name, shape in (shapes | tensors).items()
            if shape is not None
        },
        read=lambda name, _: torch.zeros((shapes | tensors)[name] or ()),
    )
    settings = UpcycleSettings(
        from_=str(tmp_path / "other"), to=str(tmp_path / "moe"), num_experts=4, top_k=2
    )
    assert upcycle(settings) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def test_a_damaged_checkpoint_is_passed_over(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dense / "checkpoints", tmp_path / "run/checkpoints")
    path = tmp_path / "run/checkpoints/step_00000016/rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    upcycled(tmp_path / "run", tmp_path / "moe")
    said = capsys.readouterr()
    assert "passing over step_00000016" in said.err
    assert "of step 15" in said.out


def test_a_top_1_model_is_told_apart_from_the_dense_one(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = upcycled(dense, tmp_path / "moe", top_k=1, normalize_gates=False)
    assert not settings_of(checkpoint).router.normalize_gates
    assert "doesn't begin as the dense one" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_prints_the_command_that_trains_on(
    dense: Path, shards: Path, tmp_path: Path
) -> None:
    done = command([sys.executable, "-m", "moetrain.upcycle", f"from={dense}", "to=moe",
                    "num_experts=4", "top_k=2", "noise=0.01"], tmp_path)  # fmt: skip
    said = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert said["to"] == f"{tmp_path}/moe, as step 0 of a run"
    python, *words = shlex.split(said["next"])
    assert python == "python"
    assert words[-1] == f"data.dir={shards}"
    command([sys.executable, *words, "train.num_steps=2", "train.global_batch_size=4",
             "train.seq_len=32", "schedule.warmup_steps=1", "run.device=cpu", "launch.mode=inline",
             "observe.wandb.mode=disabled"], tmp_path)  # fmt: skip
    lines = (tmp_path / "moe/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2


def command(words: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done
