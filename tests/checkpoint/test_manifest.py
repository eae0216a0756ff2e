"""What counts as a checkpoint, and the order in which one comes to be."""

import json
from pathlib import Path

import pytest

from moetrain.checkpoint import (
    CheckpointError,
    Manifest,
    candidates,
    next_attempt,
    read_latest,
    read_manifest,
)
from moetrain.checkpoint.manifest import commit, delete_old, describe_files, verify_files


def stage(directory: Path, step: int, *, content: bytes = b"tensors", attempt: int = 1) -> Path:
    """Writes a staged folder and commits it; returns the checkpoint's folder."""
    staged = directory / f"staged_{step}"
    staged.mkdir(parents=True)
    (staged / "shard").write_bytes(content)
    manifest = Manifest(
        step=step, attempt=attempt, state={"step": step}, config={}, tensors={},
        files=describe_files(staged),
    )  # fmt: skip
    return commit(directory, staged, manifest)


def test_a_committed_folder_is_the_latest_checkpoint(tmp_path: Path) -> None:
    folder = stage(tmp_path, 100)
    assert folder.name == "step_00000100"
    assert read_latest(tmp_path) == folder
    verify_files(folder, read_manifest(folder))
    assert not list(tmp_path.glob("staged_*"))


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    stage(tmp_path, 1)
    (tmp_path / "step_00000002").mkdir()
    (tmp_path / "latest").write_text("step_00000002")
    assert [f.name for f in candidates(tmp_path)] == ["step_00000001"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_harmed_file_is_named(tmp_path: Path, harm: str) -> None:
    folder = stage(tmp_path, 1, content=b"0123456789")
    shard = folder / "shard"
    if harm == "flip":
        shard.write_bytes(b"0123556789")
    elif harm == "truncate":
        shard.write_bytes(b"01234")
    else:
        shard.unlink()
    with pytest.raises(CheckpointError, match="shard"):
        verify_files(folder, read_manifest(folder))


def test_a_manifest_that_points_outside_its_folder_is_refused(tmp_path: Path) -> None:
    folder = stage(tmp_path, 1)
    fields = json.loads((folder / "manifest.json").read_text())
    fields["files"]["../../etc/passwd"] = {"size": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="outside the folder"):
        verify_files(folder, read_manifest(folder))


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    """Torch unpickles `.metadata`: one that no hash was checked of must not be there."""
    folder = stage(tmp_path, 1)
    (folder / ".metadata").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"\.metadata is not listed"):
        verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format_version": 99}', "{broken"])
def test_a_manifest_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    folder = stage(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(folder)


def test_an_older_attempt_may_not_commit(tmp_path: Path) -> None:
    """A worker that was cut off and comes back must not win over its successor."""
    assert [next_attempt(tmp_path), next_attempt(tmp_path)] == [1, 2]
    kept = stage(tmp_path, 5, attempt=2)
    with pytest.raises(CheckpointError, match="attempt 2 has taken the run over"):
        stage(tmp_path, 6, attempt=1)
    assert read_latest(tmp_path) == kept


def test_saving_a_step_again_never_writes_into_its_folder(tmp_path: Path) -> None:
    first = stage(tmp_path, 5, content=b"old")
    inode = (first / "shard").stat().st_ino
    again = stage(tmp_path, 5, content=b"new")
    assert (again / "shard").read_bytes() == b"new"
    assert (again / "shard").stat().st_ino != inode
    (replaced,) = tmp_path.glob("replaced_*")
    assert (replaced / "shard").read_bytes() == b"old"


def test_deleting_keeps_the_newest_and_what_latest_names(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        stage(tmp_path, step)
    (tmp_path / "latest").write_text("step_00000001")
    delete_old(tmp_path, keep_last=2, attempt=1)
    left = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert "step_00000001" in left


def test_deleting_keeps_two_good_ones_beside_a_damaged_newer_one(tmp_path: Path) -> None:
    """A run that went back to step 2 and saved step 3 must not count the damaged step 9."""
    for step in (1, 2, 9, 3):
        stage(tmp_path, step)
    delete_old(tmp_path, keep_last=2, attempt=1)
    left = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert left == ["step_00000002", "step_00000003", "step_00000009"]


def test_deleting_takes_what_killed_saves_left_but_not_of_a_newer_attempt(tmp_path: Path) -> None:
    stage(tmp_path, 1)
    for attempt in (1, 2, 3):
        (tmp_path / f"staged_00000002_attempt_{attempt}").mkdir()
    delete_old(tmp_path, keep_last=2, attempt=2)
    assert [p.name for p in tmp_path.glob("staged_*")] == ["staged_00000002_attempt_3"]


def test_deleting_keeps_the_newest_up_to_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        stage(tmp_path, step)
    delete_old(tmp_path, keep_last=2, attempt=1)
    assert [p.name for p in candidates(tmp_path)] == ["step_00000004", "step_00000003"]
