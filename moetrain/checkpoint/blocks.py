"""Which block of each tensor a rank holds, and which of them it is to write.

Owns the way from a distributed tensor to its place in the whole one. Knows no files.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.checkpoint.manifest import Block, CheckpointError, TensorEntry


class Held(NamedTuple):
    """A tensor's part on this rank, and its place in the whole tensor."""

    local: Tensor
    offset: tuple[int, ...]


def held(tensor: Tensor) -> Held:
    """Returns this rank's part of a tensor; one that isn't distributed is whole on every rank."""
    if not isinstance(tensor, DTensor):
        return Held(tensor.detach(), (0,) * tensor.ndim)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    local = _local(tensor)
    assert tuple(local.shape) == tuple(shape), f"{tuple(local.shape)} is not {tuple(shape)}"
    return Held(local, tuple(offset))


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def places_to_write(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the offsets of the parts that this rank is the one to write, of named tensors.

    Where several ranks hold the same part, one of them writes it: which one, the name decides, so
    that the work is spread. Parts without elements are nobody's.
    """
    parts = {name: held(tensor) for name, tensor in tensors.items() if _writes(name, tensor)}
    return {name: part.offset for name, part in parts.items() if part.local.numel()}


def parts_at(
    tensors: Mapping[str, Tensor], places: Mapping[str, tuple[int, ...]]
) -> dict[str, Held]:
    """Returns this rank's parts of the tensors that have a place, as they are now."""
    return {name: Held(_local(tensors[name]), offset) for name, offset in places.items()}


def _writes(name: str, tensor: Tensor) -> bool:
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    if not isinstance(tensor, DTensor):
        return draw % dist.get_world_size() == dist.get_rank()
    mesh = tensor.device_mesh
    coordinates = mesh.get_coordinate()
    assert coordinates is not None, f"this rank has no part in the mesh of {name}"
    for placement, size, coordinate in zip(tensor.placements, mesh.shape, coordinates, strict=True):
        assert not placement.is_partial(), f"{name} is a sum that was not taken"
        if placement.is_replicate():
            if draw % size != coordinate:
                return False
            draw //= size
    return True


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
    """Returns the dtype that a manifest names; raises CheckpointError where there is none such."""
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"a tensor's dtype is {entry.dtype!r}, which torch doesn't have")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name as manifests have it."""
    return str(dtype).removeprefix("torch.")


class Staging:
    """Copies of a rank's parts in memory that stays reserved: training may go on beside a save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, parts: Mapping[str, Held]) -> dict[str, Held]:
        """Returns the parts with copies in host memory, which the next call overwrites."""
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
            copies[name] = Held(buffer.copy_(part.local, non_blocking=True), part.offset)
        if on_device:
            torch.cuda.synchronize()
        return copies


def as_block(part: Held) -> Block:
    """Returns the place of a part in its tensor."""
    return Block(part.offset, tuple(part.local.shape))
