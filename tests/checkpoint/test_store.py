"""A save that fails, hangs or is cut short: what every rank learns of it, and what is kept."""

import errno
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.checkpoint import store as module
from moetrain.checkpoint.folders import Save, candidates, read_latest, to_delete
from moetrain.checkpoint.manifest import (
    CheckpointError,
    StorageError,
    forget_cached,
    read_manifest,
    verify_files,
)
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.tensor_files import CheckpointReader, TensorFileWriter
from moetrain.settings import CheckpointSettings
from tests.support.ranks import replace_in_rank, run_ranks

TIMEOUT = 3.0
"""The timeout in seconds of the collectives of the store's group."""


def open_store(directory: Path, *, timeout: float = 60, **settings: Any) -> CheckpointStore:
    return CheckpointStore(
        directory,
        CheckpointSettings(**settings),
        attempt=1,
        config={},
        mesh={},
        timeout=timedelta(seconds=timeout),
        event=lambda kind, **fields: EVENTS.append((kind, fields)),
    )


EVENTS: list[tuple[str, dict[str, Any]]] = []
"""The events that the store reported on this rank; each rank is a process of its own."""


def tensors(salt: int = 0) -> dict[str, torch.Tensor]:
    return {f"t{n}": torch.arange(1000.0) + 1000 * n + salt for n in range(8)}


def error_of(function: Callable[[], Any]) -> str | None:
    """Returns the message of a CheckpointError, None where there was no error."""
    try:
        function()
    except CheckpointError as error:
        return str(error)
    return None


def before_writing(step: int, action: Callable[[], object]) -> None:
    """Calls an action in the background before this rank writes its file of a step."""
    write_file = module._write_file

    def wrapped(staged: Path, parts: Any, **others: Any) -> Any:
        if staged.name.startswith(f"staged_{step:08d}"):
            action()
        return write_file(staged, parts, **others)

    replace_in_rank(module, "_write_file", wrapped)


def saved_steps(directory: Path) -> list[int]:
    steps = []
    for folder in candidates(directory):
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        steps.append(manifest.step)
    return steps


# ── Failures ──────────────────────────────────────────────────────────────────────────────────


def fail_on_rank_1(directory: Path, async_save: bool) -> dict[str, Any]:
    """Saves twice; at the second one rank 1 may write no more than a few bytes to a file."""
    store = open_store(directory, async_save=async_save)
    store.save(tensors(), step=1, state={})
    store.wait()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    raised = error_of(lambda: store.save(tensors(1), step=2, state={}))
    deadline = time.monotonic() + 60
    while not store.failed and time.monotonic() < deadline:
        time.sleep(0.001)
    failed, waited = store.failed, error_of(store.wait)
    return {"save": raised, "failed": failed, "wait": waited, "after": store.failed}


@pytest.mark.parametrize("async_save", [False, True])
def test_what_fails_on_one_rank_is_told_on_all_and_older_checkpoints_stay(
    tmp_path: Path, async_save: bool
) -> None:
    answers = run_ranks(fail_on_rank_1, 3, tmp_path, async_save)
    message = answers[0]["wait"]
    assert "checkpoint of step 2 can't be written to" in message
    assert "File too large" in message
    told = {"save": None if async_save else message, "failed": True, "wait": message}
    assert answers == [told | {"after": False}] * 3
    assert saved_steps(tmp_path) == [1]
    assert read_latest(tmp_path) == "step_00000001"
    assert not list(tmp_path.glob("staged_*"))


def fail_with(directory: Path, numbers: list[int]) -> tuple[type, str]:
    """Saves once; each rank's file system fails with its error's number."""
    store = open_store(directory)

    def fail() -> None:
        raise OSError(numbers[dist.get_rank()], "failed")

    before_writing(1, fail)
    store.save(tensors(), step=1, state={})
    try:
        store.wait()
    except CheckpointError as error:
        return type(error), str(error)
    raise AssertionError


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ([errno.ESTALE, errno.ESTALE], StorageError),
        ([errno.ESTALE, errno.ENOSPC], CheckpointError),
        ([errno.ENOSPC, errno.ESTALE], CheckpointError),
    ],
)
def test_a_file_system_that_fails_for_now_is_told_from_what_another_attempt_would_meet(
    tmp_path: Path, numbers: list[int], kind: type
) -> None:
    first, second = run_ranks(fail_with, 2, tmp_path, numbers)
    assert first == second
    assert first[0] is kind
    told = errno.ESTALE if kind is StorageError else errno.ENOSPC
    assert f"[Errno {told}]" in first[1]


def lose_rank_1(directory: Path, how: str) -> tuple[str, float, float]:
    """Saves twice; during the second save rank 1 dies or stops responding."""
    store = open_store(directory, timeout=TIMEOUT)
    store.save(tensors(), step=1, state={})
    store.wait()
    if dist.get_rank() == 1:
        before_writing(2, lambda: os._exit(1) if how == "dies" else time.sleep(600))
    start = time.monotonic()
    store.save(tensors(1), step=2, state={})
    if dist.get_rank() == 1:
        time.sleep(600)
    try:
        store.wait()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    waited = time.monotonic() - start
    store.close(timeout_seconds=60)  # nothing is left that would have to wait once more
    return failure, waited, time.monotonic() - start - waited


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_lost_in_the_middle_of_a_save_leaves_no_other_hanging(
    tmp_path: Path, how: str
) -> None:
    first, lost, last = run_ranks(lose_rank_1, 3, tmp_path, how, may_be_lost=1)
    assert lost is None
    for answer in (first, last):
        assert answer is not None
        failure, waited, closed = answer
        assert failure
        # One collective of ours that gives up, or finds the others gone; the rest is slack for a
        # busy machine, and less than a second wait would take.
        assert waited < 1.9 * TIMEOUT
        assert closed < 0.5 * TIMEOUT
    assert saved_steps(tmp_path) == [1]


def foresee(directory: Path) -> list[str | None]:
    """Saves to a disk with less free space than the checkpoint needs."""
    store = open_store(directory)
    store.save(tensors(), step=1, state={})
    store.wait()
    usage = shutil.disk_usage(directory)
    needed = sum(t.nbytes for t in tensors().values())
    errors = []
    for free in (needed - 1, needed):
        room = usage._replace(free=free)
        replace_in_rank(shutil, "disk_usage", lambda _, room=room: room)
        store.save(tensors(), step=2 if free < needed else 3, state={})
        errors.append(error_of(store.wait))
    return errors


def test_a_full_disk_is_foreseen_before_anything_is_written(tmp_path: Path) -> None:
    short, enough = run_ranks(foresee, 2, tmp_path)[1]
    assert short is not None
    assert "checkpoint of step 2" in short
    assert "No space left: 32.0 kB are needed, 32.0 kB are free" in short
    assert "checkpoint.keep_last" in short
    assert "run.dir" in short
    assert enough is None
    assert saved_steps(tmp_path) == [3, 1]
    assert not list(tmp_path.glob("staged_*"))


def lose_elements(directory: Path) -> str | None:
    """Saves while rank 1 believes that it has nothing to write."""
    store = open_store(directory)
    if dist.get_rank() == 1:
        replace_in_rank(module, "places_to_write", lambda _: {})
    store.save(tensors(), step=1, state={})
    return error_of(store.wait)


def test_a_checkpoint_with_a_part_that_nobody_wrote_is_not_committed(tmp_path: Path) -> None:
    first, second = run_ranks(lose_elements, 2, tmp_path)
    assert first == second
    assert "0 of the 1000 elements of t" in str(first)
    assert saved_steps(tmp_path) == []


def break_tidying(directory: Path) -> str | None:
    """Saves while the first rank can't determine what may be deleted."""
    store = open_store(directory)

    def unreadable(_: Path, **known: Any) -> list[Save]:
        raise PermissionError(13, "Permission denied")

    replace_in_rank(module, "saves", unreadable)
    store.save(tensors(), step=1, state={})
    return error_of(store.wait)


def test_what_fails_in_tidying_on_the_first_rank_alone_is_told_on_all(tmp_path: Path) -> None:
    start = time.monotonic()
    first, second = run_ranks(break_tidying, 2, tmp_path)
    assert first == second
    assert "Permission denied" in str(first)
    assert saved_steps(tmp_path) == [1]
    assert time.monotonic() - start < 55, "nobody waited for the group's time-out"


# ── Order, and the way out ────────────────────────────────────────────────────────────────────


def one_in_flight(directory: Path) -> dict[str, bool]:
    store, go_on = open_store(directory), threading.Event()
    before_writing(1, lambda: go_on.wait(60))
    store.save(tensors(1), step=1, state={})
    seen = {"failed while it is written": store.failed}
    threading.Timer(0.3, go_on.set).start()
    store.save(tensors(2), step=2, state={})
    seen["the first is complete"] = (directory / "step_00000001/manifest.json").exists()
    store.wait()
    return seen | {"the second is complete": (directory / "step_00000002").exists()}


def tell_of_life(directory: Path) -> dict[str, int]:
    """Returns how often a store reported progress, in a load, a slow save and a stuck one."""
    calls: list[str] = []
    store = CheckpointStore(
        directory,
        CheckpointSettings(async_save=False),
        attempt=1,
        config={},
        mesh={},
        timeout=timedelta(seconds=60),
        event=lambda *_, **__: None,
        alive=lambda: calls.append("alive"),
    )
    write = TensorFileWriter.write

    def slow(self: Any, name: str, tensor: torch.Tensor) -> None:  # as on a slow disk
        time.sleep(0.1)
        write(self, name, tensor)

    def counted(work: Callable[[], Any]) -> int:
        calls.clear()
        work()
        return len(calls)

    replace_in_rank(module, "ALIVE_SECONDS", 0.3)
    before_writing(1, lambda: time.sleep(2))
    stuck = counted(lambda: store.save(tensors(), step=1, state={}))
    TensorFileWriter.write = slow
    slowly = counted(lambda: store.save(tensors(), step=2, state={}))
    store.wait()
    load = counted(lambda: store.load_newest(lambda _: tensors(), same_model=lambda _: None))
    return {"stuck": stuck, "slow": slowly, "load": load}


def test_a_sign_of_life_is_given_while_a_save_or_a_load_gets_on_and_only_then(
    tmp_path: Path,
) -> None:
    (calls,) = run_ranks(tell_of_life, 1, tmp_path)
    assert calls["stuck"] <= 1
    assert calls["slow"] >= 2
    assert calls["load"] == 1 + 8  # a file verified, eight tensors read


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    for seen in run_ranks(one_in_flight, 2, tmp_path):
        assert seen == {
            "failed while it is written": False,
            "the first is complete": True,
            "the second is complete": True,
        }


def leave(directory: Path, patient: bool) -> tuple[float, bool]:
    """Leaves with a save in flight, which takes a little longer than the short timeout."""
    store, go_on = open_store(directory), threading.Event()
    before_writing(1, lambda: go_on.wait(60))
    store.save(tensors(), step=1, state={})
    if patient:
        threading.Timer(0.3, go_on.set).start()
    start = time.monotonic()
    store.close(timeout_seconds=60 if patient else 0.2)
    taken, complete = time.monotonic() - start, (directory / "latest").exists()
    go_on.set()
    return taken, complete


def test_closing_lets_a_save_come_to_its_end_within_bounds(tmp_path: Path) -> None:
    for taken, complete in run_ranks(leave, 2, tmp_path / "patient", True):
        assert complete
        assert taken < 30
    assert saved_steps(tmp_path / "patient") == [1]
    for taken, complete in run_ranks(leave, 2, tmp_path / "impatient", False):
        assert not complete
        assert 0.2 <= taken < 30


# ── What stays ────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_known_to_be_damaged_is_none_that_is_kept() -> None:
    line = [Save(step, 1) for step in range(1, 8)]
    bad = [Save(4, 1), Save(6, 1)]
    # 7 and 5 are the two good ones; 6 lies between them and goes when they have been passed.
    assert to_delete(line, keep_last=2, keep_every=None, damaged=bad) == [
        Save(s, 1) for s in (4, 3, 2, 1)
    ]
    assert to_delete(line, keep_last=2, keep_every=2, damaged=bad) == [
        Save(s, 1) for s in (4, 3, 1)
    ]
    assert to_delete(line[:3], keep_last=2, keep_every=None, damaged=line[1:3]) == []


def save_and_corrupt(directory: Path, corrupted: list[int]) -> list[tuple[str, dict[str, Any]]]:
    """Saves steps 1 to 6; some are silently corrupted once written, before the tidying."""

    def rot(path: Path) -> None:
        step = int(path.parent.name.removeprefix("step_"))
        if step in corrupted and path.name == "rank_00001.safetensors":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        # Whoever verifies that file must find it corrupted, so no rank continues before.
        dist.barrier(group=gate)
        forget_cached(path)

    store, gate = open_store(directory, keep_last=2), dist.new_group(backend="gloo")
    replace_in_rank(module, "forget_cached", rot)
    for step in range(1, 7):
        store.save(tensors(step), step=step, state={})
        store.wait()
        if dist.get_rank() == 0:
            there = sorted(int(p.name.removeprefix("step_")) for p in directory.glob("step_*"))
            EVENTS.append(("there", {"steps": there}))
    return EVENTS


@pytest.mark.trap(21)
def test_nothing_is_deleted_for_a_newest_one_that_does_not_verify(tmp_path: Path) -> None:
    """Step 4 is corrupted: the two before it are kept for it, also when step 5 is good."""
    events = run_ranks(save_and_corrupt, 2, tmp_path, [4])[0]
    # 5 and 3 are good, which 4 isn't; then 6 and 5.
    assert [f["steps"] for kind, f in events if kind == "there"] == [
        [1], [1, 2], [2, 3], [2, 3, 4], [3, 4, 5], [5, 6],
    ]  # fmt: skip
    (rejected,) = [fields for kind, fields in events if kind == "checkpoint_rejected"]
    assert rejected["checkpoint"] == "step_00000004"
    assert "rank_00001.safetensors does not have the hash" in rejected["reason"]
    assert saved_steps(tmp_path) == [6, 5]


def test_a_committed_checkpoint_is_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    run_ranks(save_and_corrupt, 1, tmp_path, [])
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "step_00000006").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with CheckpointReader(tmp_path / "step_00000006") as reader:
        assert torch.equal(reader.read("t3"), tensors(6)["t3"])
