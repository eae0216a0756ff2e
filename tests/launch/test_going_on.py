"""The same command again with other settings: on a stopped run, and on a finished one."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import train_command
from tests.support.runs import events_of, write_shards

pytestmark = pytest.mark.slow

SETTINGS = {"observe__progress": "lines", "train__num_steps": 4, "checkpoint__every_steps": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has all its steps."""
    folder = tmp_path_factory.mktemp("finished")
    code, output = train_command(folder, shards=shards, **SETTINGS)
    assert code == 0, output
    return folder


def record(folder: Path) -> dict[str, bytes]:
    """Returns what a run's folder holds, but for the number of the process that held it last."""
    run = folder / "runs/tiny"
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()} | {
        "lock": b""
    }


def test_a_finished_run_is_left_alone_and_what_differs_is_named(
    shards: Path, finished: Path
) -> None:
    before = record(finished)
    code, output = train_command(finished, shards=shards, **SETTINGS, optim__lr=0.02)
    assert code == 2
    assert "run.name=tiny: this run has all its steps, up to 4" in output
    assert "was trained with optim.lr=0.01 (not 0.02)" in output
    assert record(finished) == before
    function = {"model__router__normalize_gates": False}
    code, output = train_command(finished, shards=shards, **SETTINGS, **function)
    assert code == 2
    assert "router.normalize_gates is true" in output
    assert "accept_changes" not in output, "which would be refused next"
    assert record(finished) == before


def test_the_same_command_on_a_finished_run_says_so_and_writes_nothing(
    shards: Path, finished: Path
) -> None:
    before = record(finished)
    same = {"observe__log_every_steps": 2, "data__num_workers": 0}
    code, output = train_command(finished, shards=shards, **SETTINGS, **same)
    assert code == 0
    assert "complete  run tiny has all its 4 steps" in output
    assert "next " in output
    assert record(finished) == before


def test_a_run_killed_after_its_last_checkpoint_gets_its_end_and_keeps_its_configuration(
    tmp_path: Path, shards: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs/tiny"
    config = (run / "config.yaml").read_text()
    unended = [event for event in events_of(tmp_path) if event["event"] != "finish"]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in unended))
    (run / "report.html").unlink()
    code, output = train_command(tmp_path, shards=shards, **SETTINGS, observe__log_every_steps=2)
    assert code == 0, output
    assert [event["event"] for event in events_of(tmp_path)][-1] == "finish"
    assert (run / "report.html").is_file()
    assert (run / "config.yaml").read_text() == config


def test_more_steps_train_on_and_what_else_changed_is_told(
    tmp_path: Path, shards: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    more = SETTINGS | {"train__num_steps": 6, "optim__lr": 0.02}
    code, output = train_command(tmp_path, shards=shards, **more)
    assert code == 0, output
    (event,) = [e for e in events_of(tmp_path) if e["event"] == "settings_changed"]
    assert event["changes"] == {"train.num_steps": [4, 6], "optim.lr": [0.01, 0.02]}
    assert event["reason"] == (
        "from step 4 on: train.num_steps 4 → 6, optim.lr 0.01 → 0.02; the learning rate goes from "
        "0.001 to 0.011"
    )
    assert event["reason"] in output
