"""What counts as a checkpoint, and the order in which one is created."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moetrain.checkpoint.folders import (
    Save,
    broken,
    candidates,
    commit,
    delete,
    in_order,
    newest_good,
    next_attempt,
    read_attempt,
    read_latest,
    saves,
    to_delete,
)
from moetrain.checkpoint.manifest import (
    CheckpointError,
    FileEntry,
    Manifest,
    describe_file,
    manifest_text,
    read_manifest,
    verify_files,
)


def delete_old(
    directory: Path, *, keep_last: int, attempt: int, keep_every: int | None = None
) -> None:
    old = to_delete(saves(directory), keep_last=keep_last, keep_every=keep_every)
    delete(directory, old, attempt=attempt)


def stage(directory: Path, step: int, *, content: bytes = b"tensors", attempt: int = 1) -> Path:
    """Writes a staged folder and commits it; returns the checkpoint's folder."""
    staged = directory / f"staged_{step}"
    staged.mkdir(parents=True)
    (staged / "shard").write_bytes(content)
    manifest = Manifest(
        step=step, attempt=attempt, state={"step": step}, config={}, tensors={},
        files={"shard": describe_file(staged / "shard")},
    )  # fmt: skip
    return commit(directory, staged, manifest)


def test_a_committed_folder_is_the_latest_checkpoint(tmp_path: Path) -> None:
    folder = stage(tmp_path, 100)
    assert folder.name == "step_00000100"
    assert read_latest(tmp_path) == folder.name
    verify_files(folder, read_manifest(folder))
    assert not list(tmp_path.glob("staged_*"))


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    stage(tmp_path, 1)
    (tmp_path / "step_00000002").mkdir()
    (tmp_path / "latest").write_text("step_00000002")
    assert [f.name for f in candidates(tmp_path)] == ["step_00000001"]


@pytest.mark.parametrize("corrupt", ["flip", "truncate", "remove"])
def test_a_corrupted_file_is_named(tmp_path: Path, corrupt: str) -> None:
    folder = stage(tmp_path, 1, content=b"0123456789")
    shard = folder / "shard"
    if corrupt == "flip":
        shard.write_bytes(b"0123556789")
    elif corrupt == "truncate":
        shard.write_bytes(b"01234")
    else:
        shard.unlink()
    with pytest.raises(CheckpointError, match="shard"):
        verify_files(folder, read_manifest(folder))


def test_a_manifest_that_points_outside_its_folder_is_refused(tmp_path: Path) -> None:
    folder = stage(tmp_path, 1)
    manifest = read_manifest(folder)
    manifest.files["../../etc/passwd"] = FileEntry(size=1, xxh3_128="0")
    (folder / "manifest.json").write_text(manifest_text(manifest))
    with pytest.raises(CheckpointError, match="outside the folder"):
        verify_files(folder, read_manifest(folder))


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    folder = stage(tmp_path, 1)
    (folder / "other").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="other is not listed"):
        verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format_version": 99}', "{broken"])
def test_a_manifest_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    folder = stage(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(folder)


@pytest.mark.trap(21)
def test_an_older_attempt_may_not_commit(tmp_path: Path) -> None:
    """A worker that was cut off and comes back must not replace its successor."""
    assert [next_attempt(tmp_path), next_attempt(tmp_path)] == [1, 2]
    kept = stage(tmp_path, 5, attempt=2)
    with pytest.raises(CheckpointError, match="attempt 2 has taken the run over"):
        stage(tmp_path, 6, attempt=1)
    assert read_latest(tmp_path) == kept.name


def test_an_older_attempt_displaces_no_checkpoint_of_a_newer_one(tmp_path: Path) -> None:
    """Not even if the file that names the run's owner has been lost, or read too early."""
    kept = stage(tmp_path, 5, attempt=2, content=b"newer")
    with pytest.raises(CheckpointError, match="attempt 2 has taken the run over"):
        stage(tmp_path, 5, attempt=1, content=b"older")
    assert (kept / "shard").read_bytes() == b"newer"
    assert not list(tmp_path.glob("replaced_*"))


def test_what_a_killed_write_of_a_small_file_left_goes_with_the_next_attempt(
    tmp_path: Path,
) -> None:
    for name, age in (("killed", 100), ("written", 0)):
        path = tmp_path / f".latest.{name}.new"
        path.write_text("step_")
        os.utime(path, (time.time() - age,) * 2)
    next_attempt(tmp_path)
    assert [path.name for path in tmp_path.glob(".latest*")] == [".latest.written.new"]


def test_of_those_who_start_at_once_each_gets_an_attempt_of_its_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        attempts = list(pool.map(lambda _: next_attempt(tmp_path), range(64)))
    assert len(set(attempts)) == 64
    assert read_attempt(tmp_path) == max(attempts)
    assert next_attempt(tmp_path) == max(attempts) + 1
    assert read_attempt(tmp_path) == max(attempts) + 1


@pytest.mark.parametrize("number", ["0000000001", "٠٠٠٠٠٠٠١"])
def test_a_second_folder_of_a_step_is_no_checkpoint(tmp_path: Path, number: str) -> None:
    """It would count as one of those to keep, instead of a real one."""
    shutil.copytree(stage(tmp_path, 1), tmp_path / f"step_{number}")
    assert saves(tmp_path) == [Save(1, 1)]


@pytest.mark.parametrize("latest", ["a folder", "too many digits"])
def test_no_form_of_latest_keeps_a_run_from_loading(tmp_path: Path, latest: str) -> None:
    folder = stage(tmp_path, 1)
    (tmp_path / "latest").unlink()
    if latest == "a folder":
        (tmp_path / "latest").mkdir()
    else:
        (tmp_path / "latest").write_text("step_" + "1" * 5000)
    rejected = []
    assert newest_good(tmp_path, rejected=lambda *told: rejected.append(told)) == folder
    ((name, reason),) = rejected
    assert name == "latest"
    assert len(reason) < 1000


def test_a_kill_while_a_step_is_saved_again_leaves_latest_at_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (3, 5):
        stage(tmp_path, step)
    rename = os.rename

    def killed_before_the_last(source: Path, target: Path) -> None:
        if Path(source).name.startswith("staged_"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, 5, attempt=2)
    assert read_latest(tmp_path) == "step_00000003"
    assert not broken(tmp_path)


@pytest.mark.trap(21)
def test_saving_a_step_again_never_writes_into_its_folder(tmp_path: Path) -> None:
    first = stage(tmp_path, 5, content=b"old")
    inode = (first / "shard").stat().st_ino
    again = stage(tmp_path, 5, content=b"new")
    assert (again / "shard").read_bytes() == b"new"
    assert (again / "shard").stat().st_ino != inode
    (replaced,) = tmp_path.glob("replaced_*")
    assert (replaced / "shard").read_bytes() == b"old"


@pytest.mark.parametrize("corrupt", ["step", "case", "space", "attempt"])
def test_a_manifest_knows_when_it_was_changed(tmp_path: Path, corrupt: str) -> None:
    folder = stage(tmp_path, 1)
    path = folder / "manifest.json"
    before = path.read_text()
    changed = {
        "step": before.replace('"state": {"step": 1}', '"state": {"step": 3}'),
        "case": before.replace('"shard"', '"sharD"'),
        "space": before.replace('"state"', '"state "'),
        "attempt": before.replace('"attempt": 1', '"attempt": 3'),
    }[corrupt]
    assert changed != before
    path.write_text(changed)
    with pytest.raises(CheckpointError, match="the hash that it says itself"):
        read_manifest(folder)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    stage(tmp_path, 1).rename(tmp_path / "step_00000007")
    assert candidates(tmp_path) == []
    ((name, reason), (latest, gone)) = broken(tmp_path)
    assert name == "step_00000007"
    assert "of step 1, not of this folder's" in reason
    assert latest == "latest"
    assert "'step_00000001', which is not there" in gone


def test_the_newest_good_one_is_found_and_the_others_are_told_of(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        stage(tmp_path, step)
    (tmp_path / "step_00000004/manifest.json").unlink()
    (tmp_path / "step_00000003/shard").write_bytes(b"other")
    rejected: dict[str, str] = {}
    good = newest_good(tmp_path, rejected=rejected.__setitem__)
    assert good == tmp_path / "step_00000002"
    assert rejected.keys() == {"step_00000004", "step_00000003"}


def test_the_newest_attempts_line_comes_first() -> None:
    """Attempt 2 resumed from step 3; attempt 1's saves from step 4 on aren't in its line."""
    one, two = [Save(s, 1) for s in (1, 2, 3, 5, 9)], [Save(4, 2), Save(7, 2)]
    assert in_order([*one, *two]) == (
        [Save(7, 2), Save(4, 2), Save(3, 1), Save(2, 1), Save(1, 1)],
        [Save(9, 1), Save(5, 1)],
    )
    assert in_order([]) == ([], [])


def test_latest_has_no_say_in_what_is_loaded(tmp_path: Path) -> None:
    """Killed between rename and `latest`, or a bit of it flipped: the newest stays the newest."""
    for step in (1, 2, 3):
        stage(tmp_path, step)
    (tmp_path / "latest").write_text("step_00000002")
    assert candidates(tmp_path)[0].name == "step_00000003"


def test_an_old_checkpoint_that_is_a_symbolic_link_leaves_nothing_behind(tmp_path: Path) -> None:
    """Nor is its target deleted: it may be somebody else's, or on another disk on purpose."""
    directory, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for step in (1, 2, 3):
        stage(directory, step)
    (directory / "step_00000001").rename(elsewhere)
    (directory / "step_00000001").symlink_to(elsewhere)
    delete_old(directory, keep_last=2, attempt=1)
    assert sorted(p.name for p in directory.iterdir()) == [
        "latest", "step_00000002", "step_00000003",
    ]  # fmt: skip
    verify_files(elsewhere, read_manifest(elsewhere))


def test_a_step_can_be_saved_where_a_link_to_nothing_has_its_name(tmp_path: Path) -> None:
    stage(tmp_path, 1)
    (tmp_path / "step_00000002").symlink_to(tmp_path / "unmounted")
    folder = stage(tmp_path, 2)
    verify_files(folder, read_manifest(folder))
    assert not folder.is_symlink()
    delete_old(tmp_path, keep_last=2, attempt=1)
    assert not [p.name for p in tmp_path.iterdir() if p.is_symlink()]


def test_what_stays() -> None:
    line = [Save(step, 1) for step in range(10, 110, 10)]
    assert to_delete(line, keep_last=2, keep_every=50) == [
        Save(s, 1) for s in (80, 70, 60, 40, 30, 20, 10)
    ]
    assert to_delete([*line, Save(15, 2)], keep_last=2, keep_every=None) == []
    assert to_delete([*line, Save(15, 2), Save(35, 2)], keep_last=2, keep_every=None) == [
        Save(10, 1), Save(30, 1), Save(20, 1),
    ]  # fmt: skip


def test_a_lost_attempt_file_never_makes_an_attempt_older_than_what_it_finds(
    tmp_path: Path,
) -> None:
    (tmp_path / "attempt").write_text("5")
    stage(tmp_path, 1, attempt=5)
    (tmp_path / "attempt").unlink()
    assert next_attempt(tmp_path) == 6


def test_deleting_keeps_two_good_ones_beside_a_damaged_newer_one(tmp_path: Path) -> None:
    """A run that went back to step 2 and saved step 3 must not count the corrupted step 9."""
    for step, attempt in ((1, 1), (2, 1), (9, 1), (3, 2)):
        stage(tmp_path, step, attempt=attempt)
    delete_old(tmp_path, keep_last=2, attempt=2)
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
