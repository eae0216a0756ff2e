"""A checkpoint's manifest, and the verification of its files against it.

Owns the manifest's format and the hashes. Knows no process group and imports no torch, so that a
launcher can read it.

The file's head has everything but the blocks of tensors, which grow with the number of ranks and
follow it. The head has its own hash, and size and hash of what follows: it tells a complete
manifest from a broken one, and is all that most readers read.
"""

import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from moetrain.checkpoint.stored_blocks import (
    Block,
    Line,
    StoredBlocks,
    blocks_line,
    is_count,
    unsound,
)

FORMAT_VERSION = 3
_WITH_BLOCKS_INSIDE = 2
"""The version whose manifests have the blocks among their fields, and no head."""
MANIFEST = "manifest.json"
_BLOCKS = b'\n"blocks": {\n'
"""The line after the head; no field can contain it, since JSON has no line break in a string."""
_STEP_FOLDER = re.compile(r"step_([0-9]{8,18})")
_READ_BYTES = 8 << 20
_HEAD_BYTES = 256 << 10
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


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Global shape and dtype of a saved tensor, and the file of each of its blocks."""

    shape: tuple[int, ...]
    dtype: str
    blocks: Mapping[str, Block] = field(default_factory=dict)
    """Empty in a summary."""


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
    """Returns the manifest as JSON: a field a line, then the blocks of a tensor a line."""
    numbers = {file: number for number, file in enumerate(manifest.files)}
    lines = ",\n".join(
        f"{json.dumps(name)}: {blocks_line(entry.blocks, entry.shape, numbers)}"
        for name, entry in manifest.tensors.items()
    )
    blocks = f'"blocks": {{\n{lines}\n}}\n}}\n'
    fields = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest)}
    fields["tensors"] = {
        name: {"shape": entry.shape, "dtype": entry.dtype}
        for name, entry in manifest.tensors.items()
    }
    fields["files"] = {name: vars(entry) for name, entry in manifest.files.items()}
    fields["format_version"] = FORMAT_VERSION
    fields["blocks_size"] = len(blocks.encode())
    fields["blocks_xxh3_128"] = xxhash.xxh3_128_hexdigest(blocks.encode())
    fields["xxh3_128"] = _digest_of_fields(fields)
    head = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in fields.items())
    return "{\n" + head + blocks


def read_manifest(folder: Path) -> Manifest:
    """Reads a folder's manifest; raises CheckpointError where it is corrupted or isn't ours.

    The blocks of a tensor are parsed when they are first asked for.
    """
    return _read(folder, whole=True)


def read_summary(folder: Path) -> Manifest:
    """Reads a manifest without the blocks of its tensors; raises CheckpointError as above.

    Of the blocks only the size is checked: whoever uses a checkpoint reads its whole manifest.
    """
    return _read(folder, whole=False)


def read_to_send(folder: Path) -> Manifest:
    """Reads a manifest as `read_manifest` does, in the form that is small when it is pickled."""
    manifest = read_manifest(folder)
    if manifest.format_version == FORMAT_VERSION:
        return manifest
    return parse_manifest(manifest_text(manifest).encode(), folder)


def _read(folder: Path, *, whole: bool) -> Manifest:
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            head = _read_head(file)
            size = os.fstat(file.fileno()).st_size
            content = head + file.read() if whole else head
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    return parse_manifest(content, folder, size=size, whole=whole)


def _read_head(file: BinaryIO) -> bytes:
    """Reads until after the head; the whole file where there is none."""
    content = bytearray()
    while piece := file.read(_HEAD_BYTES):
        begin = max(0, len(content) - len(_BLOCKS))
        content += piece
        if content.find(_BLOCKS, begin) >= 0:
            break
    return bytes(content)


def parse_manifest(
    content: bytes, folder: Path, *, size: int | None = None, whole: bool = True
) -> Manifest:
    """Parses a manifest of `size` bytes, of which `content` has all, or the head at least.

    Raises CheckpointError, which names the folder, where it is corrupted or isn't ours.
    """
    path = folder / MANIFEST
    size = len(content) if size is None else size
    end = content.find(_BLOCKS) + 1
    try:
        # What comes before the blocks ends in a comma.
        fields = json.loads(content[: end - 2] + b"}" if end else content)
        version = fields["format_version"]
        if version != (FORMAT_VERSION if end else _WITH_BLOCKS_INSIDE):
            raise CheckpointError(
                f"{path}: format version {version}, but this moetrain reads "
                f"{_WITH_BLOCKS_INSIDE} and {FORMAT_VERSION}, each in its own form"
            )
        if fields.pop("xxh3_128", None) != _digest_of_fields(fields):
            raise CheckpointError(f"{path} does not have the hash that it says itself")
        tensors, files = fields.pop("tensors"), fields.pop("files")
        blocks: list[Mapping[str, Block]] = [{} for _ in tensors]
        if end:
            there, digest = fields.pop("blocks_size"), fields.pop("blocks_xxh3_128")
            if size - end != there:
                raise CheckpointError(f"{path} has {size - end} bytes of blocks, not {there}")
            if whole and xxhash.xxh3_128_hexdigest(memoryview(content)[end:]) != digest:
                raise CheckpointError(f"{path}: its blocks do not have the hash that it says")
            if whole:
                blocks = [*_stored_blocks(content[end:], tensors, list(files))]
        elif whole:
            blocks = [
                {f: Block(*map(tuple, b)) for f, b in entry["blocks"].items()}
                for entry in tensors.values()
            ]
        entries = {
            name: TensorEntry(shape=tuple(entry["shape"]), dtype=entry["dtype"], blocks=own)
            for (name, entry), own in zip(tensors.items(), blocks, strict=True)
        }
        files = {name: FileEntry(**entry) for name, entry in files.items()}
        manifest = Manifest(tensors=entries, files=files, **fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    _require_fields(manifest, folder)
    return manifest


def _stored_blocks(text: bytes, tensors: Mapping[str, Any], files: list[str]) -> list[StoredBlocks]:
    """Returns the blocks of each tensor, from the lines after the head."""
    lines = text.split(b"\n")[1:-3] if tensors else []
    if len(lines) != len(tensors):
        raise ValueError(f"it has blocks of {len(lines)} tensors, not of {len(tensors)}")
    found, known = [], dict[bytes, Line]()  # most tensors are cut like many others
    for line, (name, entry) in zip(lines, tensors.items(), strict=True):
        begin = f"{json.dumps(name)}: ".encode()
        if not line.startswith(begin):
            raise ValueError(f"the blocks of {name} are not where they should be")
        own = line.removeprefix(begin).removesuffix(b",")
        shared = known.setdefault(own, Line(own, num_files=len(files)))
        found.append(StoredBlocks(shared, shape=tuple(entry["shape"]), files=files))
    return found


def _require_fields(manifest: Manifest, folder: Path) -> None:
    """Raises CheckpointError for fields that are none, or of another step than the folder's."""
    path = folder / MANIFEST
    for field_name in ("step", "attempt"):
        if not is_count(value := getattr(manifest, field_name)):
            raise CheckpointError(f"{path}: {field_name} is {value!r}, which is no count")
    for field_name in ("state", "config", "mesh"):
        if not isinstance(value := getattr(manifest, field_name), dict):
            raise CheckpointError(f"{path}: {field_name} is {value!r}, not an object")
    if step_of(folder.name) not in (None, manifest.step):
        raise CheckpointError(f"{path} is of step {manifest.step}, not of this folder's")


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
    """Returns what is wrong with a tensor's entry; None where its blocks cover it exactly once."""
    if not isinstance(tensor.dtype, str) or not all(map(is_count, tensor.shape)):
        return f"has dtype {tensor.dtype!r} and shape {tensor.shape!r}"
    return unsound(tensor.blocks, tensor.shape, files)


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
