"""Writes a checkpoint from one process, tensor by tensor, for models that weren't trained here."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.checkpoint.blocks import dtype_of, num_bytes
from moetrain.checkpoint.folders import Save, commit, next_attempt, require_space, staged_folder
from moetrain.checkpoint.manifest import Manifest, TensorEntry
from moetrain.checkpoint.stored_blocks import Block
from moetrain.checkpoint.tensor_files import TensorFileWriter, cut_into_files


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
    max_piece_bytes: int = 256 << 20,
) -> Path:
    """Writes and commits a checkpoint; returns its folder.

    `read(name, index)` is called for one tensor at a time, or for rows of its first dimension where
    the tensor is larger than a piece may be: no more than that is ever in memory. Only shapes and
    dtypes of `tensors` are used. Raises OSError before any write if the disk can't hold all of it.
    """
    tensors = {name: replace(entry, blocks={}) for name, entry in tensors.items()}
    attempt = next_attempt(directory)
    require_space(directory, sum(map(num_bytes, tensors.values())))
    manifest = Manifest(
        step=step,
        attempt=attempt,
        state=dict(state),
        config=dict(config),
        mesh=dict(mesh),
        tensors=tensors,
        files={},
    )
    staged = staged_folder(directory, Save(step, attempt))
    staged.mkdir()
    try:
        _write_files(
            staged, manifest, read, max_file_bytes=max_file_bytes, max_piece_bytes=max_piece_bytes
        )
        return commit(directory, staged, manifest)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _write_files(
    staged: Path,
    manifest: Manifest,
    read: Callable[[str, tuple[slice, ...]], Tensor],
    *,
    max_file_bytes: int,
    max_piece_bytes: int,
) -> None:
    """Writes the tensors into files, and adds both to the manifest."""
    tensors = manifest.tensors
    files = cut_into_files(
        tensors, size=lambda name: num_bytes(tensors[name]), max_file_bytes=max_file_bytes
    )
    for number, names in enumerate(files):
        file = f"rank_{number:05d}.safetensors"
        entries = {n: (dtype_of(tensors[n]), tensors[n].shape) for n in names}
        with TensorFileWriter(staged / file, entries) as writer:
            for name in names:
                for index in _pieces(tensors[name], max_piece_bytes):
                    writer.write(name, read(name, index))
        manifest.files[file] = writer.entry
        for name in names:
            shape = tensors[name].shape
            tensors[name] = replace(tensors[name], blocks={file: Block((0,) * len(shape), shape)})


def _pieces(entry: TensorEntry, max_piece_bytes: int) -> list[tuple[slice, ...]]:
    """Returns indices of the parts in which a tensor is written: at least one row each."""
    if not entry.shape or num_bytes(entry) <= max_piece_bytes:
        return [()]
    rows = max(1, max_piece_bytes * entry.shape[0] // num_bytes(entry))
    return [(slice(a, min(a + rows, entry.shape[0])),) for a in range(0, entry.shape[0], rows)]
