"""Which block of each tensor a rank holds, and which of them it writes.

Maps a distributed tensor's local part to its place in the global tensor. Knows no files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.checkpoint.manifest import CheckpointError, FileEntry, Manifest, TensorEntry
from moetrain.checkpoint.stored_blocks import Block
from moetrain.local_part import local_part


class LocalBlock(NamedTuple):
    """This rank's part of a tensor, and its place in the global tensor."""

    local: Tensor
    offset: tuple[int, ...]


def held(tensor: Tensor) -> LocalBlock:
    """Returns this rank's part of a tensor: all of it, where it isn't distributed."""
    if not isinstance(tensor, DTensor):
        return LocalBlock(tensor.detach(), (0,) * tensor.ndim)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    local = _local(tensor)
    assert tuple(local.shape) == tuple(shape), f"{tuple(local.shape)} is not {tuple(shape)}"
    return LocalBlock(local, tuple(offset))


def _local(tensor: Tensor) -> Tensor:
    return local_part(tensor).detach()


def places_to_write(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the offsets of the parts that this rank writes, by tensor name.

    Ranks that hold the same parts take turns, the largest part first, so that one of them writes at
    most one part more than another. Empty parts are written by no rank.
    """
    shared: dict[tuple[int, ...], list[tuple[int, str, LocalBlock]]] = {}
    for name, tensor in tensors.items():
        part = held(tensor)
        if part.local.numel():
            size = part.local.numel() * part.local.element_size()
            shared.setdefault(_holders(name, tensor), []).append((-size, name, part))
    places = {}
    for ranks, parts in shared.items():
        turn = ranks.index(dist.get_rank())
        for _, name, part in sorted(parts, key=lambda p: p[:2])[turn :: len(ranks)]:
            places[name] = part.offset
    return places


def parts_at(
    tensors: Mapping[str, Tensor], places: Mapping[str, tuple[int, ...]]
) -> dict[str, LocalBlock]:
    """Returns this rank's current parts of the tensors that have a place."""
    return {name: LocalBlock(_local(tensors[name]), offset) for name, offset in places.items()}


def _holders(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Returns the ranks that hold the same part of a tensor as this one."""
    if not isinstance(tensor, DTensor):
        return tuple(range(dist.get_world_size()))
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None, f"this rank has no part in the mesh of {name}"
    assert not any(p.is_partial() for p in tensor.placements), f"{name} is a sum that was not taken"
    index = tuple(
        slice(None) if placement.is_replicate() else coordinate
        for placement, coordinate in zip(tensor.placements, coordinates, strict=True)
    )
    return tuple(tensor.device_mesh.mesh[index].flatten().tolist())


def describe(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Returns global shape and dtype of each tensor."""
    return {
        name: TensorEntry(shape=tuple(t.shape), dtype=dtype_name(t.dtype))
        for name, t in tensors.items()
    }


def num_bytes(entry: TensorEntry) -> int:
    """Returns the size of a whole tensor."""
    return math.prod(entry.shape) * dtype_of(entry).itemsize


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """Returns the dtype that a manifest names; raises CheckpointError for an unknown one."""
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"a tensor's dtype is {entry.dtype!r}, which torch doesn't have")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name in manifests."""
    return str(dtype).removeprefix("torch.")


class Staging:
    """Staging buffers of asynchronous checkpoints: a rank's parts, in reused host memory."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, parts: Mapping[str, LocalBlock]) -> dict[str, LocalBlock]:
        """Returns the parts, copied to host memory that the next call overwrites."""
        copies = {}
        on_device = False
        for name, part in parts.items():
            on_device = on_device or part.local.is_cuda
            buffer = self._buffers.get(name)
            if buffer is None:
                buffer = torch.empty(
                    part.local.shape, dtype=part.local.dtype, pin_memory=part.local.is_cuda
                )
                self._buffers[name] = buffer
            copies[name] = LocalBlock(buffer.copy_(part.local, non_blocking=True), part.offset)
        if on_device:
            torch.cuda.synchronize()
        return copies


def as_block(part: LocalBlock) -> Block:
    """Returns the place of a part in its tensor."""
    return Block(part.offset, tuple(part.local.shape))


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a rank has written: its file, and the blocks in it."""

    file: str
    entry: FileEntry
    blocks: dict[str, Block]


def complete(manifest: Manifest, parts: list[Written]) -> Manifest:
    """Returns the manifest with what all ranks have written.

    Raises CheckpointError where that isn't all of a tensor.
    """
    blocks: dict[str, dict[str, Block]] = {name: {} for name in manifest.tensors}
    for part in parts:
        for name, block in part.blocks.items():
            blocks[name][part.file] = block
    for name, entry in manifest.tensors.items():
        written = sum(math.prod(block.shape) for block in blocks[name].values())
        if written != math.prod(entry.shape):
            raise CheckpointError(f"{written} of the {math.prod(entry.shape)} elements of {name}")
    tensors = {name: replace(e, blocks=blocks[name]) for name, e in manifest.tensors.items()}
    return replace(manifest, tensors=tensors, files={part.file: part.entry for part in parts})
