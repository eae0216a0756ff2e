"""A run that is branched: what the new one takes from the old, and what stays with the old one."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moetrain.branch import BranchSettings, branch
from moetrain.checkpoint.manifest import read_manifest, verify_all
from moetrain.huggingface.run_facts import read_facts
from moetrain.settings import Resolved
from moetrain.settings.validation import validated
from tests.support.ranks import run_ranks
from tests.support.runs import events_of, metrics_of, tiny_config, train_as_rank, write_shards


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `runs/tiny`, trained for 8 steps with a checkpoint every three."""
    folder = tmp_path_factory.mktemp("trained")
    shards = write_shards(folder)
    config = tiny_config(folder, shards=shards, observe__wandb__mode="offline")
    run_ranks(train_as_rank, 1, config, None, 1)
    return folder


def branched(folder: Path, to: Path, step: int | None = None) -> int:
    run = str(folder / "runs/tiny")
    return branch(BranchSettings(run=run, to=str(to), step=step))


def test_a_branch_has_the_checkpoint_the_metrics_and_the_settings_up_to_its_step(
    trained: Path, tmp_path: Path
) -> None:
    old, new = trained / "runs/tiny", tmp_path / "runs/b"
    assert branched(trained, new, step=6) == 0
    before, after = (run / "checkpoints/step_00000006" for run in (old, new))
    manifest = read_manifest(after)
    verify_all(after, manifest)
    assert manifest.tensors == read_manifest(before).tensors
    assert [r["step"] for r in metrics_of(tmp_path, "b")] == [1, 2, 3, 4, 5, 6]
    assert metrics_of(tmp_path, "b") == metrics_of(trained)[:6]
    settings = yaml.safe_load((new / "config.yaml").read_text())
    expected = read_manifest(before).config
    run = {**expected["run"], "name": "b", "dir": str(tmp_path / "runs")}
    assert settings == manifest.config == {**expected, "run": run}
    # Its files are the old run's, and its W&B run, its lock, its logs and its attempts are not.
    assert {p.name for p in new.iterdir()} == {
        "checkpoints", "config.yaml", "events.jsonl", "experiment", "metrics.jsonl", "model",
    }  # fmt: skip
    file = "rank_00000.safetensors"
    assert os.path.samefile(before / file, after / file)


def test_a_branch_notes_where_it_came_from(trained: Path, tmp_path: Path) -> None:
    old, new, second = trained / "runs/tiny", tmp_path / "runs/b", tmp_path / "runs/c"
    assert branched(trained, new, step=3) == 0
    (event,) = events_of(tmp_path, "b")
    assert (event["event"], event["source"], event["step"]) == ("branch", str(old.resolve()), 3)
    manifest = read_manifest(new / "checkpoints/step_00000003")
    assert manifest.state["branched_from"] == {"run": "tiny", "step": 3, "attempt": 1}
    assert (new / "config.yaml").read_text().startswith(f"# Branched from {old} at 3.\n")
    facts = read_facts(new, manifest=manifest, config=validated(manifest.config, Resolved))
    assert facts.origins == ("It was branched from tiny.",)
    # A branch of a branch knows both.
    assert branch(BranchSettings(run=str(new), to=str(second))) == 0
    assert [e["source"] for e in events_of(tmp_path, "c")] == [str(old), str(new)]


def test_without_a_step_the_newest_good_checkpoint_is_branched(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs/damaged"
    assert branched(trained, run, step=6) == 0
    newest = trained / "runs/tiny/checkpoints/step_00000008"
    damaged = run / "checkpoints" / newest.name
    damaged.mkdir()
    for path in newest.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[:-1] + b"?")
    assert branch(BranchSettings(run=str(run), to=str(tmp_path / "runs/b"))) == 0
    assert "passing over step_00000008" in capsys.readouterr().err
    assert (tmp_path / "runs/b/checkpoints/latest").read_text() == "step_00000006"


def test_where_links_cannot_be_made_the_checkpoint_is_copied(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)  # what a second file system answers
    assert branched(trained, tmp_path / "b", step=6) == 0
    assert "B, a copy" in capsys.readouterr().out
    placed = tmp_path / "b/checkpoints/step_00000006"
    verify_all(placed, read_manifest(placed))
    assert (placed / "rank_00000.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize(
    ("to", "step", "said"),
    [
        ("taken", 6, "is there already: use a folder that is new or empty"),
        ("b", 5, "has no such step: use one of 3, 6, 8"),
    ],
)
def test_what_cannot_be_branched_is_said_and_nothing_is_written(
    trained: Path, tmp_path: Path, to: str, step: int, said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    assert branched(trained, tmp_path / to, step=step) == 2
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_branch_does_not_lie_in_its_source(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert branched(trained, trained / "runs/tiny/b", step=6) == 2
    assert "lies in the run" in capsys.readouterr().err
    assert not (trained / "runs/tiny/b").exists()


def test_a_folder_that_is_no_run_is_not_branched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    assert branch(BranchSettings(run=str(tmp_path / "model"), to=str(tmp_path / "b"))) == 2
    assert "has no checkpoints/" in capsys.readouterr().err
    (tmp_path / "model/config.json").write_text("{}")
    assert branch(BranchSettings(run=str(tmp_path / "model"), to=str(tmp_path / "b"))) == 2
    assert "make a run of it first" in capsys.readouterr().err
    assert branch(BranchSettings(run="runs/nope", to=str(tmp_path / "b"))) == 2
    said = capsys.readouterr().err
    assert "run=runs/nope: is no folder here" in said
    assert "import_hf" not in said
    assert branch(BranchSettings(run="lab/moe", to=str(tmp_path / "b"))) == 2
    assert (
        "python -m moetrain.import_hf from=lab/moe to=runs/moe makes one" in capsys.readouterr().err
    )


def test_the_command_that_is_printed_goes_on_as_the_old_run_did_with_a_wandb_run_of_its_own(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "my lab/runs/b"
    assert branched(trained, new, step=6) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("next"))
    words = shlex.split(line.removeprefix("next"))
    assert words[:3] == ["python", "-m", "moetrain"]
    process = subprocess.run(
        [sys.executable, *words[1:], "launch.mode=inline"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert [e["step"] for e in events_of(new.parents[1], "b") if e["event"] == "resume"] == [6]
    records = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["step"], r["train/loss"]) for r in records]
    assert losses == [(r["step"], r["train/loss"]) for r in metrics_of(trained)]
    old_id, new_id = ((run / "wandb/run_id").read_text() for run in (trained / "runs/tiny", new))
    assert old_id != new_id
    state = read_manifest(new / "checkpoints/step_00000008").state
    assert state["branched_from"]["step"] == 6
