"""The Python surface gives what the commands use, by the numbers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain import api
from moetrain.checks import ConfigError
from moetrain.export import ExportSettings, export
from moetrain.settings import Resolved
from tests.support.commands import train_command
from tests.support.huggingface_folders import loaded
from tests.support.ranks import CONTEXT
from tests.support.runs import metrics_of, tiny_config, write_shards
from tests.support.tensors import sharded

ROOT = Path(__file__).parents[1]
CHANGES: dict[str, Any] = {
    "train__micro_batch_size": 4,
    "model__num_layers": 3,
    "model__num_dense_layers": 1,
    "model__dense_ffn_hidden_dim": 48,
    "model__router__jitter_noise": 0.1,
    "launch__mode": "inline",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with shards, and `runs/tiny`, trained by the command."""
    folder = tmp_path_factory.mktemp("api")
    code, output = train_command(folder, shards=write_shards(folder), **CHANGES)
    assert code == 0, output
    return folder


def test_a_configuration_is_that_of_the_command_line() -> None:
    config = api.compose("+model=8x160m", "model.num_experts=16", "run.name=1e5")
    assert (config.model.num_experts, config.run.name) == (16, "1e5")
    assert config.train.global_batch_size > 16, "its recipe came with it"
    resolved = api.resolve(config, num_ranks=4)
    assert (resolved.num_ranks, resolved.parallel.data_shard_degree) == (4, 4)
    with pytest.raises(ConfigError, match=r"model\.top_k"):
        api.compose("+model=toy", "model.top_k=99")
    with pytest.raises(ValueError, match=r"num_expert: .*did you mean"):
        api.compose("+model=toy", "model.num_expert=8")
    with pytest.raises(ValueError, match="8x7c"):
        api.compose("+model=8x7c")


def take_steps(config: Resolved) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Trains a configuration; returns the losses, and the weights that it began with."""
    with api.training(config) as training:
        named = training.model.named_parameters()
        began = {name: sharded(p).full_tensor().detach().clone() for name, p in named}
        return [training.step(batch).cross_entropy for batch in training.batches()], began


def test_steps_are_those_of_the_command_bit_for_bit(trained: Path) -> None:
    config = tiny_config(trained, shards=trained / "shards", **CHANGES)
    with CONTEXT.Pool(1) as pool:
        losses, began = pool.apply(take_steps, (config,))
    assert losses == [record["train/cross_entropy"] for record in metrics_of(trained)]
    fresh = dict(api.new_model(config).named_parameters())
    assert began.keys() == fresh.keys()
    assert all(torch.equal(began[name], weight) for name, weight in fresh.items())


def test_a_model_comes_from_a_run_or_a_hugging_face_folder(trained: Path, tmp_path: Path) -> None:
    run = trained / "runs/tiny"
    text = torch.randint(0, 257, (2, 20))
    ours = api.load_model(run)
    expected = loaded(run / "checkpoints/step_00000008", ours.settings)
    assert torch.equal(ours(text), expected(text))
    earlier = api.load_model(run, step=6)
    assert not torch.equal(earlier(text), expected(text))
    assert api.load_model(run, dtype=torch.bfloat16)(text).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="has no such step: use one of"):
        api.load_model(run, step=5)

    plain = tmp_path / "plain"
    code, output = train_command(plain, shards=trained / "shards", launch__mode="inline")
    assert code == 0, output
    settings = ExportSettings(
        run=str(plain / "runs/tiny"), to=str(tmp_path / "hf"), drop_router_bias=True
    )
    assert export(settings) == 0
    theirs = api.load_model(tmp_path / "hf")
    assert theirs.settings.num_experts == 4
    mine = api.load_model(plain / "runs/tiny")
    for moe in mine.moe_layers():
        moe.router.bias.zero_()  # which an export leaves out
    torch.testing.assert_close(theirs(text), mine(text))


def test_routing_is_what_the_model_does_with_a_text(trained: Path) -> None:
    run = trained / "runs/tiny"
    model, tokenizer = api.load_model(run), api.load_tokenizer(run)
    ids = torch.as_tensor(tokenizer.encode("def f(x): return x").astype("int64"))
    assert tokenizer.decode(ids.numpy()) == "def f(x): return x"
    layers = api.routing(model, ids)
    assert [found.layer for found in layers] == [1, 2], "of the layers that have a router"
    for found in layers:
        assert found.experts.shape == found.gates.shape == (len(ids), 2)
        assert found.gates.sum(-1) == pytest.approx(1.0)
        counts = torch.bincount(found.experts.flatten(), minlength=4)
        assert torch.equal(found.load, counts / counts.sum())
    batch = torch.stack([ids, ids.flip(0)])
    (first, _), (again, _) = layers, api.routing(model, batch)
    assert torch.equal(again.experts[0], first.experts), "whatever stands beside it"


def test_the_examples_run(trained: Path, tmp_path: Path) -> None:
    def run(name: str, *words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / name, *words],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    small = ["train.num_steps=2", "schedule.warmup_steps=1", "train.global_batch_size=2"]
    lines = run("train_in_twenty_lines.py", f"data.dir={trained / 'shards'}", *small)
    assert [line.split("  ")[0] for line in lines] == ["step 1", "step 2"]
    lines = run("look_into_experts.py", str(trained / "runs/tiny"), "ab")
    assert [line.split(":")[0] for line in lines[:2]] == ["layer 1", "layer 2"]
    assert [line.split()[0] for line in lines[2:]] == ["'a'", "'b'"]
