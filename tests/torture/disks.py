"""Disks that fill up, can't be written, or silently corrupt what was written."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetrain.checkpoint.folders import newest_good, next_attempt
from moetrain.checkpoint.manifest import CheckpointError, Manifest
from moetrain.checkpoint.store import CheckpointStore
from moetrain.settings import CheckpointSettings
from tests.torture.attempts import Attempt, on_each_operation
from tests.torture.content import drawn, equal, read_plainly
from tests.torture.corruptions import flip
from tests.torture.tally import Tally

ROWS = 256
"""Of each tensor: 1.5 MiB a checkpoint."""
_DISK = "10m"
_TIMEOUT_SECONDS = 8.0


def torture_by_disks(folder: Path, *, num: int, seed: int) -> list[Tally]:
    """Saves on disks that fail in different ways; returns the results of each."""
    full = Tally("a small disk full, before a save or within it")
    closed = Tally("a folder that can't be written to")
    rotten = Tally("new checkpoints that rot on the disk at once")
    folder.mkdir()
    with _small_disk(folder / "disk", [full, closed]) as disk:
        if disk:
            _count(full, folder, save_on_a_full_disk, disk, num, seed)
            _count(closed, folder, save_where_nothing_can_be_written, disk, max(4, num // 4), seed)
    _count(rotten, folder, save_on_a_rotting_disk, folder / "rotting", max(4, num // 4), seed)
    return [full, closed, rotten]


def _count(tally: Tally, folder: Path, function: Callable[..., Any], *arguments: Any) -> None:
    with Attempt(function, *arguments, log=folder / "ranks.log") as attempt:
        for outcome, note, problem in attempt.result(within=300):
            tally.add(outcome, note=note, problem=problem)


@contextlib.contextmanager
def _small_disk(mount_point: Path, tallies: list[Tally]) -> Iterator[Path | None]:
    """Mounts a tmpfs; if that isn't allowed, yields None and gives the tallies the reason."""
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(mount_point)]
    reason = "mounting a small disk needs root"
    if os.geteuid() == 0:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = f"this machine does not let root mount a tmpfs: {done.stderr.strip()}"
        if done.returncode == 0:
            try:
                yield mount_point
            finally:
                subprocess.run(["umount", "--lazy", str(mount_point)], check=True)
            return
    for tally in tallies:
        tally.skipped = reason
    yield None


Verdict = tuple[str, str, str]


class _Trial:
    """One rank's view of saves into a folder, whose content tells attempt and step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.leads = dist.get_rank() == 0
        self.attempt = 0
        self.saved: dict[str, Any] = {}
        self.verdicts: list[Verdict] = []
        self.events: list[str] = []

    def open(self, **options: Any) -> CheckpointStore:
        """Takes over the run with the next attempt, and opens a store for it."""
        taken = [next_attempt(self.directory) if self.leads else 0]
        dist.broadcast_object_list(taken)
        self.attempt = taken[0]
        return CheckpointStore(
            self.directory,
            CheckpointSettings(keep_last=2, async_save=False),
            attempt=self.attempt,
            config={},
            mesh={},
            timeout=timedelta(seconds=2 * _TIMEOUT_SECONDS),
            event=lambda kind, **fields: self.events.append(kind),
            **options,
        )

    def save(self, store: CheckpointStore, step: int) -> tuple[list[str | None], float]:
        """Saves and tidies up; returns each rank's error, and the seconds that it took."""
        state = {"attempt": self.attempt, "step": step}
        failure: Exception | None = None
        start = time.monotonic()
        try:
            store.save(drawn(**state, rows=ROWS), step=step, state=state)
            store.wait()
        except Exception as error:
            failure = error
            store.close(timeout_seconds=2 * _TIMEOUT_SECONDS)  # as a run ends
        errors: list[str | None] = [None] * dist.get_world_size()
        named = failure and ("" if isinstance(failure, CheckpointError) else "unnamed: ")
        dist.all_gather_object(errors, failure and f"{named}{type(failure).__name__}: {failure}")
        return errors, time.monotonic() - start

    def newest(self) -> dict[str, Any]:
        """Returns the state of the newest good checkpoint, {} where there is none."""
        found = newest_good(self.directory, rejected=lambda name, reason: None)
        if found is None:
            return {}
        tensors, state = read_plainly(found)
        return state if equal(tensors, drawn(**state, rows=ROWS)) else {"other content": found}

    def judge(self, note: str, step: int, errors: list[str | None], seconds: float) -> None:
        """Judges the state after a save, on the first rank."""
        if not self.leads:
            return
        before, own = self.saved, {"attempt": self.attempt, "step": step}
        self.saved = newest = self.newest()
        outcome, problem = ("detected" if errors[0] else "survived"), ""
        if errors.count(None) not in (0, len(errors)):
            outcome, problem = "lost", f"the ranks don't agree: {errors}"
        elif any(error and error.startswith("unnamed") for error in errors):
            outcome, problem = "lost", f"not an error that says what failed: {errors}"
        elif newest not in ([before, own] if errors[0] else [own]):
            outcome, problem = "silent" if not errors[0] else "lost", f"{before}, then {newest}"
        elif seconds > _TIMEOUT_SECONDS:
            outcome, problem = "lost", f"the ranks waited {seconds:.0f} s for each other: {errors}"
        elif errors[0] and (left := list(self.directory.glob("staged_*"))):
            outcome, problem = "lost", f"space not given back: {left}"
        self.verdicts.append((outcome, note, problem))


def save_on_a_full_disk(disk: Path, num: int, seed: int) -> list[Verdict]:
    """Saves while another writer fills the disk: before the save, or at an operation of it."""
    trial, fill_at, count = _Trial(disk / "checkpoints"), 0, 0
    draw = random.Random(f"full {seed}")  # the same on all ranks

    def fill_in_time(_: str) -> None:
        nonlocal count
        count += 1
        if count == fill_at:
            _fill(disk, leave=left)

    if trial.leads:
        on_each_operation(trial.directory, fill_in_time)
    for number in range(num):
        store = trial.open()
        foreseen = number % 5 == 0
        left = draw.choice((0, draw.randrange(1 << 20), draw.randrange(1 << 15)))
        when = number % 11 + 1  # before the 10th operation `latest` is renamed
        if foreseen:
            left = draw.randrange(6 * ROWS * 256 * 4)
            if trial.leads:
                _fill(disk, leave=left)
        count, fill_at = 0, 0 if foreseen else when
        errors, seconds = trial.save(store, step := number + 1)
        fill_at = 0
        (disk / "filler").unlink(missing_ok=True)
        note = "foreseen" if foreseen else "while saving"
        if foreseen and not all(error and "No space left" in error for error in errors):
            trial.verdicts.append(("silent", note, f"{left} bytes were left: {errors}"))
        trial.judge(note, step, errors, seconds)
        dist.barrier()
    return trial.verdicts


def save_where_nothing_can_be_written(disk: Path, num: int, seed: int) -> list[Verdict]:
    """Saves to a disk that has become read-only, and where a file is in the folder's place."""
    trial = _Trial(disk / "checkpoints")
    aside = disk / "aside"
    for number in range(num):
        store, step = trial.open(), 1000 + 2 * number
        trial.judge("writable", step, *trial.save(store, step))
        store = trial.open()
        dist.barrier()
        if number % 2:
            note = "read-only disk"
            if trial.leads:
                _remount(disk, "ro")
        else:
            note = "a file in the place of the folder"
            if trial.leads:
                trial.directory.rename(aside)
                trial.directory.write_bytes(b"")
        dist.barrier()
        errors, seconds = trial.save(store, step + 1)
        if trial.leads:
            _refused_at_the_start(trial, note)
        dist.barrier()
        if trial.leads and number % 2:
            _remount(disk, "rw")
        elif trial.leads:
            trial.directory.unlink()
            aside.rename(trial.directory)
        trial.judge(note, step + 1, errors, seconds)
        if not all(errors):
            trial.verdicts.append(("silent", note, f"no error: {errors}"))
        dist.barrier()
    return trial.verdicts


def save_on_a_rotting_disk(directory: Path, num: int, seed: int) -> list[Verdict]:
    """Saves seven times; most files are corrupted right after; the newest good checkpoint stays."""
    trial = _Trial(directory)
    verdicts: list[Verdict] = []
    for number in range(num):
        draw = random.Random(f"rotting {seed} {number}")
        good = draw.randint(1, 6)  # and more than are kept may come after it
        rotten = {s for s in range(2, 8) if s > good or (s < good and draw.random() < 0.5)}

        if trial.leads:
            shutil.rmtree(directory, ignore_errors=True)
        dist.barrier()
        store = trial.open(good=partial(_rot, rotten=rotten, draw=draw))
        errors = [trial.save(store, step)[0][0] for step in range(1, 8)]
        if trial.leads:
            newest, named = trial.newest(), "checkpoint_rejected" in trial.events
            problem = ""
            if newest != {"attempt": trial.attempt, "step": good} or any(errors):
                problem = f"of {sorted(rotten)} rotten, {newest} is left: {errors}"
            outcome = "detected" if named else "survived"
            verdicts.append(("lost" if problem else outcome, "rotten", problem))
            trial.events.clear()
    return verdicts


def _rot(folder: Path, manifest: Manifest, *, rotten: set[int], draw: random.Random) -> None:
    if manifest.step in rotten:
        flip(draw.choice(sorted(folder.glob("*.safetensors"))), draw)


def _refused_at_the_start(trial: _Trial, note: str) -> None:
    """Checks that taking the run over fails with an OSError that names the folder."""
    try:
        next_attempt(trial.directory)
    except OSError as error:
        if str(trial.directory) in str(error):
            return
    trial.verdicts.append(("silent", note, "an attempt was begun where nothing can be written"))


def _fill(disk: Path, *, leave: int) -> None:
    """Writes a file that leaves so many bytes, rounded down to pages, of a disk."""
    with open(disk / "filler", "wb") as file:
        if (size := shutil.disk_usage(disk).free - leave) > 0:
            os.posix_fallocate(file.fileno(), 0, size)


def _remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)
