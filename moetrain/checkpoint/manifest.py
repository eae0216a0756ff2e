"""What makes a folder a checkpoint: a manifest that lists its tensors and the hash of each file.

Owns names, hashes, the `latest` pointer and the order in which things reach the disk. Knows
no process group and imports no torch: a launcher may read it.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
ATTEMPT = "attempt"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


class CheckpointError(Exception):
    """A checkpoint that can't be written, read or trusted; the message names it and why."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Global shape and dtype of a saved tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a checkpoint says of itself; everything in it is JSON."""

    step: int
    attempt: int
    state: dict[str, Any]
    """The trainer's counters: step, samples, tokens, …"""
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[str, dict[str, Any]]
    """Size in bytes and sha256 of every other file in the folder."""
    format_version: int = FORMAT_VERSION


def folder_name(step: int) -> str:
    """Returns the name of a step's folder."""
    return f"step_{step:08d}"


def step_folders(directory: Path) -> list[Path]:
    """Returns the folders of complete checkpoints, newest step first."""
    found = [p for p in directory.glob("step_*") if _STEP_FOLDER.fullmatch(p.name)]
    complete = [p for p in found if (p / MANIFEST).is_file()]
    return sorted(complete, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)


def read_latest(directory: Path) -> Path | None:
    """Returns the folder that `latest` names, if it names a complete checkpoint."""
    try:
        name = (directory / LATEST).read_text().strip()
    except FileNotFoundError:
        return None
    folder = directory / name
    complete = _STEP_FOLDER.fullmatch(name) and (folder / MANIFEST).is_file()
    return folder if complete else None


def candidates(directory: Path) -> list[Path]:
    """Returns the checkpoints to try in turn: the one that `latest` names, then the others."""
    latest, folders = read_latest(directory), step_folders(directory)
    return ([latest] if latest else []) + [f for f in folders if f != latest]


def read_manifest(folder: Path) -> Manifest:
    """Reads a folder's manifest; raises CheckpointError where it isn't one of ours."""
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_text())
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version}, but this moetrain reads {FORMAT_VERSION}"
            )
        tensors = {
            name: TensorEntry(shape=tuple(entry["shape"]), dtype=entry["dtype"])
            for name, entry in fields.pop("tensors").items()
        }
        return Manifest(tensors=tensors, **fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def describe_files(folder: Path, pattern: str = "*") -> dict[str, dict[str, Any]]:
    """Returns size and sha256 of the files in a folder whose names match a pattern."""
    return {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.glob(pattern))
    }


def verify_files(folder: Path, manifest: Manifest, *, part: int = 0, parts: int = 1) -> None:
    """Checks every `parts`-th listed file, from `part`: there, whole and unchanged.

    Raises CheckpointError naming the file. Nothing is unpickled before this has passed.
    """
    listed = {MANIFEST, *manifest.files}
    found = (p.name for p in folder.iterdir())  # file managers and NFS leave dot files
    counted = (n for n in found if not n.startswith(".") or n == ".metadata")
    if unlisted := sorted(n for n in counted if n not in listed):
        raise CheckpointError(f"{folder / unlisted[0]} is not listed in the manifest")
    for name, entry in sorted(manifest.files.items())[part::parts]:
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{folder}: the manifest lists {name!r}, outside the folder")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if (size := path.stat().st_size) != entry["size"]:
            raise CheckpointError(f"{path} has {size} bytes, its manifest says {entry['size']}")
        if _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} does not have the sha256 that its manifest lists")


def commit(directory: Path, staged: Path, manifest: Manifest) -> Path:
    """Makes a staged folder the checkpoint of its step, and `latest` name it.

    In this order: manifest, fsync, rename, fsync, `latest` by rename. Killed in between, the
    folder either is a whole checkpoint or has no name that counts. Raises CheckpointError where
    a newer attempt owns the run: a worker that was cut off must not win over its successor.
    """
    _demand_ownership(directory, manifest)
    _write(staged / MANIFEST, json.dumps(asdict(manifest), indent=1))
    _sync_folder(staged)
    target = directory / folder_name(manifest.step)
    if target.exists():  # the same step of an older attempt, which a fall-back left behind
        replaced = directory / f"replaced_{target.name}_by_attempt_{manifest.attempt}"
        os.rename(target, replaced)
    os.rename(staged, target)
    _sync_folder(directory)
    _demand_ownership(directory, manifest)  # again: what comes before may have taken a while
    replace_text(directory / LATEST, target.name)
    return target


def _demand_ownership(directory: Path, manifest: Manifest) -> None:
    if (owner := read_attempt(directory)) > manifest.attempt:
        raise CheckpointError(
            f"attempt {manifest.attempt} may not save step {manifest.step} in {directory}: "
            f"attempt {owner} has taken the run over"
        )


def delete_old(directory: Path, *, keep_last: int, attempt: int) -> None:
    """Deletes checkpoints past the newest `keep_last`, and what killed saves left behind.

    A checkpoint beyond the one that `latest` names was passed over as damaged: it doesn't count,
    and stays until its step is saved again. Staged folders of a newer attempt are not ours.
    """
    latest = read_latest(directory)
    counted = [f for f in step_folders(directory) if latest is None or f.name <= latest.name]
    leftovers = [*directory.glob("staged_*"), *directory.glob("replaced_*")]
    own = [f for f in leftovers if int(f.name.rpartition("_")[2]) <= attempt]
    for folder in [*counted[keep_last:], *own]:
        shutil.rmtree(folder, ignore_errors=True)


def next_attempt(directory: Path) -> int:
    """Takes the run over: returns the number of the new attempt, one above all before."""
    directory.mkdir(parents=True, exist_ok=True)
    attempt = read_attempt(directory) + 1
    replace_text(directory / ATTEMPT, str(attempt))
    return attempt


def read_attempt(directory: Path) -> int:
    """Returns the number of the newest attempt, 0 where there was none."""
    try:
        return int((directory / ATTEMPT).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def replace_text(path: Path, text: str) -> None:
    """Writes a small file so that it is seen whole, old or new, whenever the writer is killed."""
    new = path.with_name(f".{path.name}.new")
    _write(new, text)
    os.replace(new, path)
    _sync_folder(path.parent)


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
