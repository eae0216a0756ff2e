"""`dry_run=true`: what a start would refuse is refused, what it would train is said, no more."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from launch.submit.__main__ import training_arguments
from launch.sweeps.table import Trial, result_of, write_table
from moetrain.command import config_dir, run_command
from moetrain.config import check
from moetrain.model import active_parameters, total_parameters
from moetrain.report import render_report
from moetrain.settings import Config
from moetrain.settings.validation import validated
from moetrain.sweeping.sweep import sweep
from moetrain.training import train
from tests.support.runs import events_of, tiny_values, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def begun(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that was trained to its end, of 4 steps, by its command."""
    folder = tmp_path_factory.mktemp("begun")
    values = tiny_values(folder, shards=shards, train__num_steps=4, launch__mode="inline")
    program = (
        "import json, sys; from moetrain.settings import Config; "
        "from moetrain.settings.validation import validated; from moetrain.training import train; "
        "sys.exit(train(validated(json.loads(sys.argv[1]), Config)))"
    )
    command = [sys.executable, "-c", program, json.dumps(values)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def dry(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Returns a function that makes a dry run of the tiny run with changes, and its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(folder: Path = tmp_path, **changes: Any) -> int:
        changes = {"launch__mode": "inline", "launch__num_workers": None} | changes
        before = listing(folder)
        code = train(validated(tiny_values(folder, shards=shards, dry_run=True, **changes), Config))
        assert listing(folder) == before, "nothing is written"
        return code

    yield run
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "data").exists()


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_says_what_would_be_trained_and_stops(dry: Any, capsys: Any, tmp_path: Path) -> None:
    assert dry(train__micro_batch_size=2) == 0
    model, training, memory, source, run, end = capsys.readouterr().out.splitlines()
    assert model == "model: 47.6 k parameters, 35.3 k active for a token; 175 kFLOPs a token"
    assert training == (
        "training: 8 steps of 8 x 32 = 2.05 k tokens; 1 rank (expert 1, shard 1, replicate 1), "
        "4 micro-batches of 2 sequences a step"
    )
    assert memory.startswith("memory: up to ")
    for part in ("(weights 186 KiB, gradients 186 KiB, optimizer 372 KiB, gathered", "activations"):
        assert part in memory
    assert source.startswith("source corpus: 2.05 k tokens, 1 of the samples; ")
    assert "epochs by the end" in source
    assert run == f"run: {tmp_path}/runs/tiny, a new one"
    assert end == "dry run: this could start; nothing was written"


def test_shards_that_would_have_to_be_built_are_not(dry: Any, capsys: Any, shards: Path) -> None:
    assert dry(data__dir=None, data__corpus=str(shards.parent / "corpus")) == 0
    said = capsys.readouterr().out
    assert "its shards would be built first, in " in said
    assert said.count("\n") == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vocab_size": 100}, "model.vocab_size=100: "),
        ({"data__dir": None, "data__corpus": "/nowhere"}, "data.corpus='/nowhere' doesn't exist"),
        ({"data__weights": {"other": 1.0}}, "other"),
        ({"data__max_epochs": 0.001}, "is over at step"),
        ({"model__top_k": 9}, "model.top_k=9: "),
        (
            {"model__num_experts": 1},
            "model.num_experts=1: is a dense model, and model.top_k=2: add",
        ),
        ({"run__dir": "/proc/x"}, "run.dir=/proc/x: the run's folder tiny there: "),
        ({"checkpoint__upload_to": "file:///missing"}, "upload_to=file:///missing: is no folder"),
        ({"parallel__expert_degree": 3}, "parallel.expert_degree=3: "),
        ({"launch__num_workers": 2}, "launch.num_workers=2: "),
    ],
)
def test_what_a_start_would_refuse_is_refused(
    dry: Any, capsys: Any, changes: dict[str, Any], message: str
) -> None:
    assert dry(**changes) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_an_older_run_of_the_name_is_looked_at(
    dry: Any, begun: Path, tmp_path: Path, capsys: Any
) -> None:
    assert dry(begun) == 0
    assert "runs/tiny, which would resume from step 4\n" in capsys.readouterr().out
    assert dry(begun, train__num_steps=4) == 0
    said = capsys.readouterr().out
    assert "runs/tiny, which has all its 4 steps\n" in said
    assert said.endswith(
        "dry run: this run is complete: nothing would be trained; nothing was written\n"
    )
    (tmp_path / "other.txt").write_text("another text")
    other = {"data__dir": None, "data__corpus": str(tmp_path / "other.txt")}
    assert dry(begun, train__num_steps=4, **other) == 2
    assert "was trained on the shards in " in capsys.readouterr().err
    assert dry(begun, model__ffn_hidden_dim=64) == 2
    assert "model.ffn_hidden_dim=64: run tiny is of another model" in capsys.readouterr().err
    assert dry(begun, checkpoint__resume="never") == 2
    assert "checkpoint.resume=never: " in capsys.readouterr().err
    with (begun / "runs/tiny/lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert dry(begun) == 2
    assert "is training this run: stop it first" in capsys.readouterr().err


def test_of_the_ranks_of_another_launcher_the_first_alone_speaks(
    dry: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, lines in ((0, 6), (1, 0)):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
        assert dry(launch__mode="auto") == 0
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_a_sweep_is_a_table_and_leaves_nothing(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = [
        "-m", "dry_run=true", f"data.dir={shards}", "launch.mode=inline", "run.name=s",
        "model.num_experts=4,8", "train.num_steps=60",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moetrain", *words])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        run_command(
            train, tree=Config, module="moetrain", files=config_dir(), sweep=sweep, check=check
        )
    assert ended.value.code == 0
    header, first, second, end = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "trial", "model.num_experts", "parameters", "active", "FLOPs", "a", "token", "tokens",
        "ranks", "GiB", "a", "rank", "run",
    ]  # fmt: skip
    assert first.split()[:6] == ["1", "4", "1.84", "M", "1.05", "M"]
    assert second.split()[:6] == ["2", "8", "3.41", "M", "1.05", "M"]
    assert [row.split()[-1] for row in (first, second)] == ["s-1", "s-2"]
    assert end.startswith("dry run: ")
    assert list(tmp_path.iterdir()) == []


def test_a_submitted_job_is_the_one_that_makes_the_dry_run() -> None:
    words = ["model=toy", "dry_run=true", "launch.address=auto", "submit.python=python3"]
    assert training_arguments(words) == ["model=toy", "dry_run=true"]


def test_a_run_s_record_report_and_table_have_its_counts(
    begun: Path, shards: Path, tmp_path: Path
) -> None:
    model = validated(tiny_values(begun, shards=shards), Config).model
    (event,) = [e for e in events_of(begun) if e["event"] == "model"]
    assert event["parameters"] == total_parameters(model)
    assert event["active_parameters"] == active_parameters(model)
    assert event["flops_per_token"] > 6 * (active_parameters(model) - 257 * 32)
    assert event["tokens"] == 4 * 8 * 32
    assert event["memory_gib"].keys() == {
        "weights", "gradients", "optimizer", "gathered", "activations",
    }  # fmt: skip
    rows = {row["role"]: row for row in event["parameter_groups"]}
    assert sum(row["parameters"] for row in rows.values()) == total_parameters(model)
    assert rows["router"] == {
        "role": "router", "tensors": 2, "parameters": 2 * 4 * 32, "optimizer": "adamw",
        "lr_factor": 1.0, "weight_decay": 0.1,
    }  # fmt: skip
    assert rows["norm"]["weight_decay"] == 0.0
    run = begun / "runs/tiny"
    tile = "<b>47.6 k</b><span>parameters</span><small>35.3 k active</small>"
    assert tile in render_report(run).read_text()
    trial = Trial(number=1, varied={"lr": "1"}, command=(), run_dir=run, num_workers=1)
    table = write_table([result_of(trial, 0)], tmp_path).splitlines()
    assert table[1].split()[:7] == [
        "trial", "lr", "end", "parameters", "active", "steps", "tokens",
    ]  # fmt: skip
    assert table[2].split()[:10] == [
        "1", "1", "done", "47.6", "k", "35.3", "k", "4", "1.02", "k",
    ]  # fmt: skip
    (line,) = (tmp_path / "trials.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["parameters"], found["tokens"]) == (total_parameters(model), 4 * 8 * 32)
