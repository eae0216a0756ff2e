"""Tensors in safetensors files: streamed and hashed as they are written, read block by block.

Nothing is ever unpickled. Owns the format; leaves the meaning of a file to others.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain.checkpoint.blocks import dtype_of
from moetrain.checkpoint.manifest import (
    CheckpointError,
    FileEntry,
    Manifest,
    TensorEntry,
    read_manifest,
)
from moetrain.checkpoint.stored_blocks import Block, BlocksError, StoredBlocks

Item = TypeVar("Item")

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def cut_into_files(
    items: Iterable[Item], *, size: Callable[[Item], int], max_file_bytes: int
) -> list[list[Item]]:
    """Returns the tensors of each file, in order: at most `max_file_bytes`, at least one tensor."""
    files: list[list[Item]] = []
    room = 0
    for item in items:
        if not files or size(item) > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(item)
        room -= size(item)
    return files


class TensorFileWriter:
    """Writes a new safetensors file, tensor after tensor in the order of `entries`.

    Nothing is held in memory, and the hash is of the bytes as they were passed in. Leaving the
    context syncs the file to disk. Raises FileExistsError if the file exists.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._path = path
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._entries = dict(entries)
        self._left: dict[str, int] = {}
        """The bytes of each tensor that are still to be written, in order."""
        begin = 0
        for name, (dtype, shape) in entries.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _CODES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, begin + size],
            }
            self._left[name] = size
            begin += size
        self._names, self._place = list(self._left), 0
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned to 8 bytes
        self._hash, self._size = xxhash.xxh3_128(), 0
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 – closed by close()
        self._put(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor, or the next rows of one.

        Raises ValueError where it is out of order, too long, or not of the declared dtype or shape.
        """
        while self._place < len(self._names) and not self._left[self._names[self._place]]:
            if self._names[self._place] == name:
                break
            self._place += 1
        due = self._names[self._place] if self._place < len(self._names) else None
        if name != due:
            raise ValueError(f"{self._path}: {name} is written, but {due or 'nothing'} is due")
        dtype, shape = self._entries[name]
        if tensor.dtype != dtype or tensor.ndim != len(shape) or tensor.shape[1:] != shape[1:]:
            raise ValueError(
                f"{self._path}: {name} is {tensor.dtype} {list(tensor.shape)}, but {dtype} "
                f"{list(shape)} or rows of it are due"
            )
        size, left = tensor.numel() * tensor.element_size(), self._left[name]
        if size > left:
            raise ValueError(f"{self._path}: {size} bytes of {name}, but {left} are due")
        # Restrided: one element is contiguous with any stride, and may have no view as bytes.
        flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
        self._put(flat.view(torch.uint8).numpy().data)
        self._left[name] -= size

    @property
    def entry(self) -> FileEntry:
        """Size and hash of what has been written so far."""
        return FileEntry(size=self._size, xxh3_128=self._hash.hexdigest())

    def close(self) -> None:
        """Syncs the file to disk; raises ValueError where a tensor is incomplete."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if missing := [name for name, left in self._left.items() if left]:
            raise ValueError(f"{self._path}: {missing[0]} was not written whole")

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def _put(self, content: bytes | memoryview) -> None:
        self._hash.update(content)
        self._file.write(content)
        self._size += len(content)


class CheckpointReader:
    """Reads tensors of a checkpoint, or parts of them, whatever layout wrote it.

    Reads only what is requested, and needs no process group. The files should have been verified
    before. Raises CheckpointError where the checkpoint doesn't hold what is requested.
    """

    def __init__(self, folder: Path, *, manifest: Manifest | None = None) -> None:
        """`manifest` is the folder's, where it has been read already."""
        self.manifest: Manifest = read_manifest(folder) if manifest is None else manifest
        self._folder = folder
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()  # the last reference unmaps a file

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """Returns a copy of a tensor, or of the part of it that `index` selects.

        `index` has slices without steps, and may leave out trailing dimensions. Raises ValueError
        where it has more dimensions than the tensor, or a step.
        """
        entry, index = self._entry(name), index or ()
        if len(index) > len(entry.shape) or any(part.step not in (None, 1) for part in index):
            raise ValueError(f"{index} is no part of {name}, which is {list(entry.shape)}")
        ranges = [part.indices(length) for part, length in zip(index, entry.shape, strict=False)]
        ranges += [(0, length, 1) for length in entry.shape[len(ranges) :]]
        block = Block(
            tuple(start for start, _, _ in ranges),
            tuple(max(0, stop - start) for start, stop, _ in ranges),
        )
        target = torch.empty(block.shape, dtype=dtype_of(entry))
        self.read_into(name, target, offset=block.offset)
        return target

    def read_into(self, name: str, target: Tensor, *, offset: tuple[int, ...]) -> None:
        """Fills a tensor with the part of a saved one that begins at `offset`."""
        wanted, filled = Block(offset, tuple(target.shape)), 0
        for file, saved in self._meeting(name, wanted):
            if (both := overlap(wanted, saved)) is None:
                continue
            ours, theirs = both
            part = self._slice(file, name, theirs, whole=saved.shape)
            if part.dtype != target.dtype:  # copy_ would convert silently
                raise CheckpointError(
                    f"{self._folder / file}: {name} is {part.dtype}, not {target.dtype}"
                )
            target[ours].copy_(part)
            filled += part.numel()
        if filled != target.numel():  # verified blocks are disjoint
            raise CheckpointError(
                f"{self._folder} holds {filled} of the {target.numel()} elements of {name} from "
                f"{list(offset)} to {[o + s for o, s in zip(offset, target.shape, strict=True)]}"
            )

    def _meeting(self, name: str, wanted: Block) -> list[tuple[str, Block]]:
        """Returns the blocks that may overlap a part of a tensor."""
        blocks = self._entry(name).blocks
        if not isinstance(blocks, StoredBlocks):
            return list(blocks.items())
        try:
            return list(blocks.meeting(wanted))
        except BlocksError as error:
            raise CheckpointError(f"{self._folder}: the blocks of {name}: {error}") from error

    def _slice(
        self, file: str, name: str, index: tuple[slice, ...], *, whole: tuple[int, ...]
    ) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self._folder / file, framework="pt")
            saved = self._open[file].get_slice(name)
            if tuple(saved.get_shape()) != whole:
                raise CheckpointError(
                    f"{self._folder / file}: {name} has shape {saved.get_shape()}, and the "
                    f"manifest says {list(whole)}"
                )
            if all(i == slice(0, n) for i, n in zip(index, whole, strict=True)):
                part: Tensor = self._open[file].get_tensor(name)
            else:
                part = saved[index]
            return part
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._folder / file}: {name} can't be read: {error}"
            ) from error

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self._folder} has no tensor {name}") from None


def overlap(ours: Block, theirs: Block) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Returns the overlap of two blocks of a tensor as an index into each; None without one."""
    left, right = [], []
    for a, m, b, n in zip(ours.offset, ours.shape, theirs.offset, theirs.shape, strict=True):
        begin, end = max(a, b), min(a + m, b + n)
        if begin >= end:
            return None
        left.append(slice(begin - a, end - a))
        right.append(slice(begin - b, end - b))
    return tuple(left), tuple(right)
