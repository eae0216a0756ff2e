"""A checkpoint's manifest, and the verification of its files against it.

Owns the manifest's format and the hashes. Knows no process group and imports no torch, so that a
launcher can read it.
"""

import dataclasses
import errno
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step_([0-9]{8,18})")
_READ_BYTES = 8 << 20
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.EADDRINUSE,
}  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint can't be written, read or trusted; the message names it and says why."""


class StorageError(CheckpointError):
    """A checkpoint can't be written because a file system fails: another attempt may work."""


def is_passing(error: BaseException | None) -> bool:
    """Returns whether an error is transient: a file system's or a network's."""
    return isinstance(error, StorageError) or (
        isinstance(error, OSError) and error.errno in _PASSING
    )


class Block(NamedTuple):
    """A part of a tensor: its offset and its size in each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Global shape and dtype of a saved tensor, and the file of each of its blocks."""

    shape: tuple[int, ...]
    dtype: str
    blocks: dict[str, Block] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size in bytes and XXH3-128 of a file."""

    size: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a checkpoint records about itself, as JSON values."""

    step: int
    attempt: int
    state: dict[str, Any]
    """The trainer's counters: step, samples, tokens, position in the data, …"""
    config: dict[str, Any]
    mesh: dict[str, Any] = field(default_factory=dict)
    """The layout that wrote it, for information only: loading doesn't depend on it."""
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    """Every other file in the folder."""
    format_version: int = FORMAT_VERSION


def step_of(name: str) -> int | None:
    """Returns the step in a folder's name, None where it isn't a checkpoint's name."""
    match = _STEP_FOLDER.fullmatch(name)
    step = int(match[1]) if match else None
    # With more leading zeros, it would be a second folder for the same step.
    return step if step is not None and name == folder_name(step) else None


def folder_name(step: int) -> str:
    """Returns the name of a step's folder."""
    return f"step_{step:08d}"


def manifest_text(manifest: Manifest) -> str:
    """Returns the manifest as JSON, one line per field, its own hash last."""
    # By hand, because there may be a million blocks and asdict copies each of them.
    fields = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest)}
    fields["tensors"] = {name: vars(entry) for name, entry in manifest.tensors.items()}
    fields["files"] = {name: vars(entry) for name, entry in manifest.files.items()}
    fields["xxh3_128"] = _digest_of_fields(fields)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_manifest(folder: Path) -> Manifest:
    """Reads a folder's manifest; raises CheckpointError where it is corrupted or isn't ours."""
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_text())
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version}, but this moetrain reads {FORMAT_VERSION}"
            )
        if fields.pop("xxh3_128", None) != _digest_of_fields(fields):
            raise CheckpointError(f"{path} does not have the hash that it says itself")
        tensors = {
            name: TensorEntry(
                shape=tuple(entry["shape"]),
                dtype=entry["dtype"],
                blocks={f: Block(*map(tuple, b)) for f, b in entry["blocks"].items()},
            )
            for name, entry in fields.pop("tensors").items()
        }
        files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
        manifest = Manifest(tensors=tensors, files=files, **fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    for field_name in ("step", "attempt"):
        if not _is_count(value := getattr(manifest, field_name)):
            raise CheckpointError(f"{path}: {field_name} is {value!r}, which is no count")
    for field_name in ("state", "config", "mesh"):
        if not isinstance(value := getattr(manifest, field_name), dict):
            raise CheckpointError(f"{path}: {field_name} is {value!r}, not an object")
    if step_of(folder.name) not in (None, manifest.step):
        raise CheckpointError(f"{path} is of step {manifest.step}, not of this folder's")
    return manifest


def verify_all(folder: Path, manifest: Manifest) -> None:
    """Checks a whole checkpoint as `verify_files` does, several files at the same time."""
    parts = max(1, min(len(manifest.files), os.cpu_count() or 1))
    with ThreadPoolExecutor(parts) as pool:
        checks = [
            pool.submit(verify_files, folder, manifest, part=part, parts=parts)
            for part in range(parts)
        ]
        for check in checks:
            check.result()


def verify_files(
    folder: Path,
    manifest: Manifest,
    *,
    part: int = 0,
    parts: int = 1,
    advanced: Callable[[], None] = lambda: None,
) -> None:
    """Checks every `parts`-th file and tensor, from `part`.

    Each listed file must exist, complete and unchanged; the blocks of a tensor must be in listed
    files and cover each element exactly once. Raises CheckpointError naming the first violation. No
    tensor is read before this has passed. `advanced` is called after each file.
    """
    listed = {MANIFEST, *manifest.files}
    try:
        found = {p.name for p in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder} can't be read: {error}") from error
    # File managers and network file systems leave files whose names begin with a dot.
    if unlisted := sorted(n for n in found - listed if not n.startswith(".")):
        raise CheckpointError(f"{folder / unlisted[0]} is not listed in the manifest")
    for name, entry in sorted(manifest.files.items())[part::parts]:
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{folder}: the manifest lists {name!r}, outside the folder")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        try:
            ours = describe_file(path)
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error}") from error
        if ours.size != entry.size:
            raise CheckpointError(f"{path} has {ours.size} bytes, its manifest says {entry.size}")
        if ours != entry:
            raise CheckpointError(f"{path} does not have the hash that its manifest lists")
        advanced()
    for name, tensor in sorted(manifest.tensors.items())[part::parts]:
        if reason := _unsound(tensor, manifest.files):
            raise CheckpointError(f"{folder / MANIFEST}: tensor {name} {reason}")


def _unsound(tensor: TensorEntry, files: Mapping[str, FileEntry]) -> str | None:
    """Returns what is wrong with a tensor's blocks; None where they cover it exactly once."""
    if not isinstance(tensor.dtype, str) or not all(map(_is_count, tensor.shape)):
        return f"has dtype {tensor.dtype!r} and shape {tensor.shape!r}"
    blocks = tensor.blocks.values()
    for file, (offset, shape) in tensor.blocks.items():
        if file not in files:
            return f"is in {file!r}, which the manifest doesn't list"
        if not (
            len(offset) == len(shape) == len(tensor.shape)
            and all(map(_is_count, (*offset, *shape)))
            and all(o + n <= whole for o, n, whole in zip(offset, shape, tensor.shape, strict=True))
        ):
            return f"of shape {tensor.shape} has a block from {offset} of shape {shape}"
    if sum(math.prod(block.shape) for block in blocks) != math.prod(tensor.shape):
        return "has other parts in its files than make it up"
    if len(blocks) > 1 and _meet(list(blocks), num_dims=len(tensor.shape)):
        return "has a part that is there twice"
    return None


def _meet(blocks: list[Block], *, num_dims: int) -> bool:
    """Returns whether any two blocks overlap; fast for blocks that form a grid."""
    dim = max(range(num_dims), key=lambda d: len({block.offset[d] for block in blocks}), default=0)
    reaching: list[Block] = []
    for block in sorted(blocks, key=lambda b: b.offset[dim : dim + 1]):
        reaching = [b for b in reaching if b.offset[dim] + b.shape[dim] > block.offset[dim]]
        for other in reaching:
            pairs = zip(block.offset, block.shape, other.offset, other.shape, strict=True)
            if all(a < b + n and b < a + m for a, m, b, n in pairs):
                return True
        reaching.append(block)
    return False


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def describe_file(path: Path) -> FileEntry:
    """Returns size and hash of a file."""
    digest, size, buffer = xxhash.xxh3_128(), 0, bytearray(_READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return FileEntry(size=size, xxh3_128=digest.hexdigest())


def forget_cached(path: Path) -> None:
    """Makes the next read of a file come from the disk, where the system supports it."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _digest_of_fields(fields: Mapping[str, Any]) -> str:
    """Returns a hash of the values, which doesn't depend on their formatting."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def require_same_tensors(
    ours: Mapping[str, TensorEntry], theirs: Mapping[str, TensorEntry], folder: Path
) -> None:
    """Raises CheckpointError where a checkpoint's tensors aren't those to be read from it."""
    saved = {name: replace(entry, blocks={}) for name, entry in theirs.items()}
    for name in sorted(ours.keys() | saved.keys()):
        if ours.get(name) != saved.get(name):
            what = "optimizer" if name.startswith("optimizer.") else "model"
            raise CheckpointError(
                f"{folder} is of another {what}: tensor {name} is {saved.get(name) or 'absent'} "
                f"there and {ours.get(name) or 'absent'} here. Use the configuration that it was "
                "trained with, or another run.name"
            )
