"""Writing a checkpoint from one process, tensor by tensor: for what comes from elsewhere."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.checkpoint.blocks import dtype_of, num_bytes
from moetrain.checkpoint.folders import Save, commit, demand_space, next_attempt, staged_folder
from moetrain.checkpoint.manifest import Block, FileEntry, Manifest, TensorEntry
from moetrain.checkpoint.tensor_files import TensorFileWriter

_PIECE_BYTES = 256 << 20


def write_checkpoint(
    directory: Path,
    *,
    step: int,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    mesh: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry],
    read: Callable[[str, tuple[slice, ...]], Tensor],
    max_file_bytes: int = 4 << 30,
) -> Path:
    """Writes and commits a checkpoint; returns its folder.

    `read(name, index)` is asked for one tensor at a time, or for rows of its first dimension where
    it has more than a piece may have: no more than that is ever in memory.
    """
    attempt = next_attempt(directory)
    staged = staged_folder(directory, Save(step, attempt))
    staged.mkdir()
    demand_space(staged, sum(map(num_bytes, tensors.values())))
    files: dict[str, FileEntry] = {}
    for number, names in enumerate(_in_files(tensors, max_file_bytes)):
        file = f"rank_{number:05d}.safetensors"
        entries = {n: (dtype_of(tensors[n]), tensors[n].shape) for n in names}
        with TensorFileWriter(staged / file, entries) as writer:
            for name in names:
                for index in _pieces(tensors[name]):
                    writer.write(name, read(name, index))
        files[file] = writer.entry
        for name in names:
            shape = tensors[name].shape
            tensors[name].blocks[file] = Block((0,) * len(shape), shape)
    manifest = Manifest(
        step=step,
        attempt=attempt,
        state=dict(state),
        config=dict(config),
        mesh=dict(mesh),
        tensors=dict(tensors),
        files=files,
    )
    return commit(directory, staged, manifest)


def _in_files(tensors: Mapping[str, TensorEntry], max_file_bytes: int) -> list[list[str]]:
    """Returns which tensors go into each file: in order, one at least."""
    files: list[list[str]] = []
    room = 0
    for name, entry in tensors.items():
        if not files or num_bytes(entry) > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(name)
        room -= num_bytes(entry)
    return files


def _pieces(entry: TensorEntry) -> list[tuple[slice, ...]]:
    """Returns indices of the parts in which a tensor is written."""
    if not entry.shape or num_bytes(entry) <= _PIECE_BYTES:
        return [()]
    rows = max(1, _PIECE_BYTES * entry.shape[0] // num_bytes(entry))
    return [(slice(a, min(a + rows, entry.shape[0])),) for a in range(0, entry.shape[0], rows)]
