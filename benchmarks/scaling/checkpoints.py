"""A start's reading of checkpoints: how many are kept, and how many ranks wrote them.

The manifests are those of a model of 240 tensors, every one of them cut among all ranks.
"""

import os
import pickle
from pathlib import Path

from benchmarks.scaling.case import Case
from moetrain.checkpoint.folders import broken, candidates, next_attempt
from moetrain.checkpoint.manifest import (
    FileEntry,
    Manifest,
    TensorEntry,
    folder_name,
    manifest_text,
    read_to_send,
)
from moetrain.checkpoint.stored_blocks import Block, StoredBlocks
from moetrain.checkpoint.trained import newest_manifest

_NUM_TENSORS = 240
_ROWS, _COLUMNS = 16, 64


def _write(directory: Path, *, steps: int, num_ranks: int) -> None:
    files = {f"rank_{rank:05d}.safetensors": _FILE for rank in range(num_ranks)}
    blocks = {file: Block((n * _ROWS, 0), (_ROWS, _COLUMNS)) for n, file in enumerate(files)}
    entry = TensorEntry(shape=(num_ranks * _ROWS, _COLUMNS), dtype="float32", blocks=blocks)
    for step in range(1, steps + 1):
        folder = directory / folder_name(step)
        folder.mkdir(parents=True)
        manifest = Manifest(
            step=step,
            attempt=1,
            state={"step": step},
            config={},
            tensors={f"model.layers.{number}.weight": entry for number in range(_NUM_TENSORS)},
            files=files,
        )
        path = folder / "manifest.json"
        path.write_text(manifest_text(manifest))
        os.utime(path, (1e9, 1e9))  # as old as those that a start finds


_FILE = FileEntry(size=1 << 30, xxh3_128="0" * 32)


def _start(folder: Path) -> None:
    """What the driver and the first rank read before the first step."""
    directory = folder / "checkpoints"
    newest_manifest(folder)
    newest_manifest(folder)
    next_attempt(directory)
    assert not [name for name, _ in broken(directory) if name != "latest"]
    read_to_send(candidates(directory)[0])


def _write_and_send(folder: Path, num_ranks: int) -> None:
    _write(folder / "checkpoints", steps=1, num_ranks=num_ranks)
    sent = pickle.dumps(read_to_send(folder / "checkpoints" / folder_name(1)))
    (folder / "sent").write_bytes(sent)


def _read_own_part(folder: Path, num_ranks: int) -> None:
    """What another rank does with the manifest that it is sent: finds its block of each tensor."""
    manifest: Manifest = pickle.loads((folder / "sent").read_bytes())
    wanted = Block(((num_ranks - 1) * _ROWS, 0), (_ROWS, _COLUMNS))
    for entry in manifest.tensors.values():
        assert isinstance(entry.blocks, StoredBlocks)
        assert len(list(entry.blocks.meeting(wanted))) == 1


CASES = (
    Case(
        name="resume/kept",
        unit="checkpoints of 64 ranks",
        sizes=(5, 50, 500),
        prepare=lambda size, folder: _write(folder / "checkpoints", steps=size, num_ranks=64),
        run=lambda size, folder: _start(folder),
    ),
    Case(
        name="resume/ranks",
        unit="ranks, 3 checkpoints",
        sizes=(64, 512, 4096),
        prepare=lambda size, folder: _write(folder / "checkpoints", steps=3, num_ranks=size),
        run=lambda size, folder: _start(folder),
    ),
    Case(
        name="resume/own_part",
        unit="ranks",
        sizes=(64, 512, 4096),
        prepare=lambda size, folder: _write_and_send(folder, size),
        run=lambda size, folder: _read_own_part(folder, size),
    ),
)
