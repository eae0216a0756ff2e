"""The folder of a run's checkpoints: listing, ordering, committing and deleting them.

Owns names, `latest` and the attempts' numbers. Knows no process group and imports no torch, so that
a launcher can use it.
"""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from data_pipeline.atomic_files import name_folder, remove_leftovers, write_file
from data_pipeline.quantities import decimal_size
from moetrain.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    folder_name,
    manifest_text,
    read_manifest,
    read_summary,
    step_of,
    verify_all,
)

LATEST = "latest"
ATTEMPT = "attempt"
_CLAIM = ".attempt_"
_NAME_CHARACTERS = 255
"""No valid name is longer; messages cut longer ones off."""
_SETTLED_SECONDS = 5.0
_LEFTOVER = re.compile(r"(?:staged|replaced|deleted)_.*attempt_(\d+)")


class Save(NamedTuple):
    """The step of a checkpoint, and the attempt that wrote it."""

    step: int
    attempt: int


def in_order(saves: Iterable[Save]) -> tuple[list[Save], list[Save]]:
    """Returns the saves on the run's current line, newest first, and those off the line.

    When an attempt resumes from some step, what older attempts had saved after that step is off the
    line: it was skipped as corrupted, or a user went back. The newest attempt decides, so that a
    worker of an older attempt that was cut off and returns never gets ahead of it.
    """
    line: list[Save] = []
    beside: list[Save] = []
    lowest, current, lowest_of_newer = None, None, None
    for save in sorted(saves, key=lambda s: (s.attempt, s.step), reverse=True):
        if save.attempt != current:
            current, lowest_of_newer = save.attempt, lowest
        if lowest_of_newer is not None and save.step >= lowest_of_newer:
            beside.append(save)
            continue
        line.append(save)
        lowest = save.step
    return line, sorted(beside, reverse=True)


def to_delete(
    saves: Collection[Save],
    *,
    keep_last: int,
    keep_every: int | None,
    damaged: Collection[Save] = (),
) -> list[Save]:
    """Returns the saves to delete.

    On the line, the newest `keep_last` stay, and those whose step is a multiple of `keep_every`.
    Those known to be corrupted count as neither. Saves off the line stay until the line has passed
    their step.
    """
    assert keep_last >= 2, "a bad newest one needs a fall-back"
    line, beside = in_order(saves)
    old, num_good = [], 0
    for save in line:
        good = save not in damaged
        stays_for_good = good and keep_every is not None and save.step % keep_every == 0
        if num_good >= keep_last and not stays_for_good:
            old.append(save)
        num_good += good
    return old + [s for s in beside if s.step <= line[0].step]


def candidates(directory: Path) -> list[Path]:
    """Returns the checkpoints to try in turn: the run's line, newest first, then the others.

    A folder without a valid manifest is not a checkpoint. `latest` isn't used: it is for people and
    other programs, and may be out of date after a kill.
    """
    line, beside = in_order(saves(directory))
    return [directory / folder_name(save.step) for save in (*line, *beside)]


def saves(directory: Path) -> list[Save]:
    """Returns the checkpoints of a directory, in no particular order."""
    return [said for _, said in _said(directory) if isinstance(said, Save)]


def broken(directory: Path) -> list[tuple[str, str]]:
    """Returns the name of each folder that looks like a checkpoint but isn't one, and why.

    Only summaries are read: a checkpoint whose blocks or files are damaged is found by its use, and
    by `moetrain checkpoint verify=…`.
    """
    found = [(folder.name, said) for folder, said in _said(directory) if isinstance(said, str)]
    try:
        name = read_latest(directory)
    except OSError as error:  # a folder, say
        return [*found, (LATEST, f"{directory / LATEST} can't be read: {error}")]
    if name is not None and not (step_of(name) is not None and (directory / name).is_dir()):
        found.append((LATEST, f"{directory / LATEST} names {name!r}, which is not there"))
    return found


def _said(directory: Path) -> list[tuple[Path, Save | str]]:
    """Returns each folder with a checkpoint's name, and which it is, or why it is none."""
    found = []
    for folder in sorted(directory.glob("step_*")):
        if step_of(folder.name) is not None:
            try:
                of_file = (folder / MANIFEST).stat()
                version = of_file.st_ino, of_file.st_size, of_file.st_mtime_ns
                # Not where it may change again without another time: clocks tick a hundred times a
                # second, and file systems on a network round to seconds.
                settled = time.time() - of_file.st_mtime > _SETTLED_SECONDS
                read = _read_once if settled else _read_once.__wrapped__
                found.append((folder, read(folder, version)))
            except OSError as error:
                found.append((folder, f"{folder / MANIFEST} can't be read: {error}"))
    return found


@lru_cache(maxsize=4096)
def _read_once(folder: Path, version: tuple[int, int, int]) -> Save | str:
    """Returns which checkpoint a folder is, or why it is none; reads each version of it once.

    A start asks several times, and a run keeps many. `version` is of the manifest's file.
    """
    try:
        summary = read_summary(folder)
    except CheckpointError as error:
        return str(error)
    return Save(summary.step, summary.attempt)


def read_latest(directory: Path) -> str | None:
    """Returns the name in `latest`, None where there is no such file; raises other OSErrors."""
    try:
        with open(directory / LATEST, errors="replace") as file:
            return file.read(_NAME_CHARACTERS).strip()
    except FileNotFoundError:
        return None


def newest_good(directory: Path, *, rejected: Callable[[str, str], None]) -> Path | None:
    """Returns the newest checkpoint whose files verify, None where there is none.

    `rejected` is called with the name and the reason of each that was skipped.
    """
    for name, reason in broken(directory):
        rejected(name, reason)
    for folder in candidates(directory):
        try:
            verify_all(folder, read_manifest(folder))
        except CheckpointError as error:
            rejected(folder.name, str(error))
            continue
        return folder
    return None


def staged_folder(directory: Path, save: Save) -> Path:
    """Returns the staging folder, in which a checkpoint is written before it is committed."""
    return directory / f"staged_{save.step:08d}_attempt_{save.attempt}"


def commit(directory: Path, staged: Path, manifest: Manifest) -> Path:
    """Makes a staged folder the checkpoint of its step, and `latest` name it.

    In this order: manifest, fsync, rename, fsync, `latest` by rename. If it is killed in between,
    the folder is either a complete checkpoint or not named as one. Raises CheckpointError where a
    newer attempt owns the run: a worker that was cut off must not win over its successor. It may
    have been cut off at any point, so the owner is checked before each change.
    """
    _require_ownership(directory, manifest)
    write_file(staged / MANIFEST, manifest_text(manifest))
    target = directory / folder_name(manifest.step)
    if os.path.lexists(target):  # the same step of an older attempt, left by a fall-back
        _require_ownership(directory, manifest)
        _point_elsewhere(target)
        _put_aside(target, manifest)
    name_folder(staged, target)
    _require_ownership(directory, manifest)
    write_file(directory / LATEST, target.name)
    try:
        _require_ownership(directory, manifest)
    except CheckpointError:
        write_file(directory / LATEST, candidates(directory)[0].name)
        raise
    return target


def _point_elsewhere(folder: Path) -> None:
    """Makes `latest` name another checkpoint than the one that is about to be renamed."""
    directory = folder.parent
    if read_latest(directory) == folder.name:
        if others := [other for other in candidates(directory) if other != folder]:
            write_file(directory / LATEST, others[0].name)
        else:
            (directory / LATEST).unlink()


def _put_aside(target: Path, manifest: Manifest) -> None:
    """Renames an older attempt's checkpoint away; raises CheckpointError for a newer attempt's."""
    directory = target.parent
    _require_older(target, manifest)
    aside = _free(directory, f"replaced_{target.name}", attempt=manifest.attempt)
    os.rename(target, aside)
    try:
        _require_older(aside, manifest)
    except CheckpointError:  # it came in between
        os.rename(aside, target)
        raise


def _require_older(folder: Path, manifest: Manifest) -> None:
    try:
        owner = read_summary(folder).attempt
    except CheckpointError:
        return  # not a checkpoint
    if owner > manifest.attempt:
        raise _taken_over(folder.parent, manifest, owner)


def require_newest(directory: Path, attempt: int) -> None:
    """Raises CheckpointError for an attempt that has a successor, which owns the run."""
    if (owner := read_attempt(directory)) > attempt:
        raise CheckpointError(
            f"attempt {attempt} of the run of {directory} ends itself: attempt {owner} has taken "
            "the run over"
        )


def _require_ownership(directory: Path, manifest: Manifest) -> None:
    if (owner := read_attempt(directory)) > manifest.attempt:
        raise _taken_over(directory, manifest, owner)


def _taken_over(directory: Path, manifest: Manifest, owner: int) -> CheckpointError:
    return CheckpointError(
        f"attempt {manifest.attempt} may not save step {manifest.step} in {directory}: "
        f"attempt {owner} has taken the run over"
    )


def delete(directory: Path, old: Sequence[Save], *, attempt: int) -> None:
    """Deletes checkpoints, and what killed saves of this and older attempts left behind.

    A folder is renamed first, so that a deletion that is killed leaves no partial checkpoint.
    """
    for save in old:
        name = folder_name(save.step)
        with contextlib.suppress(OSError):
            os.rename(directory / name, _free(directory, f"deleted_{name}", attempt=attempt))
    try:
        folders = list(directory.iterdir())
    except OSError:
        return  # the next save says why, on all ranks; here, others would wait for this one
    for folder in folders:
        match = _LEFTOVER.match(folder.name)
        if match and int(match[1]) <= attempt:
            remove(folder)


def remove(path: Path) -> None:
    """Deletes a folder, or only the link where it is a link to one."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _free(directory: Path, name: str, *, attempt: int) -> Path:
    """Returns a free name for something that this attempt may delete."""
    path, number = directory / f"{name}_attempt_{attempt}", 1
    while os.path.lexists(path):
        path, number = directory / f"{name}_{number}_attempt_{attempt}", number + 1
    return path


def next_attempt(directory: Path) -> int:
    """Takes the run over: returns the number of the new attempt, one above all before."""
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    # The file may have been lost; earlier attempts' checkpoints then still have their numbers.
    attempt = max([read_attempt(directory), *(save.attempt for save in saves(directory))])
    while True:
        attempt += 1
        try:  # if two start at the same time, on any machines, only one gets the number
            (directory / f"{_CLAIM}{attempt}").touch(exist_ok=False)
            break
        except FileExistsError:
            continue
    while read_attempt(directory) < (newest := _newest_claim(directory)):
        write_file(directory / ATTEMPT, str(newest))  # and check again for a newer claim
    return attempt


def _newest_claim(directory: Path) -> int:
    numbers = (claim.name.removeprefix(_CLAIM) for claim in directory.glob(f"{_CLAIM}*"))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def read_attempt(directory: Path) -> int:
    """Returns the number of the newest attempt, 0 where there was none."""
    try:
        return int((directory / ATTEMPT).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises OSError, before anything is written, if the disk can't hold so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        needed, left = decimal_size(num_bytes), decimal_size(free)
        raise OSError(
            errno.ENOSPC, f"No space left: {needed} are needed, {left} are free in {folder}"
        )


def with_way_out(reason: str, error: BaseException | None) -> str:
    """Returns why a run's file can't be written, and what to do if the disk is full."""
    if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return reason
    return (
        f"{reason}; make room there, keep fewer checkpoints (checkpoint.keep_last, 2 at least), or "
        "move the run's folder to another disk and give run.dir, and start the same command again"
    )
