"""What a checkpoint holds, read without any of the code under test."""

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_plainly(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns a checkpoint's tensors, put together from its files, and its state."""
    manifest = plain_manifest(folder)
    files = {file: load_file(folder / file) for file in manifest["files"]}
    tensors = {}
    for name, entry in manifest["tensors"].items():
        whole = torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        filled = torch.zeros(entry["shape"], dtype=torch.bool)
        for file, (offset, shape) in entry["blocks"].items():
            index = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            whole[index], filled[index] = files[file][name], True
        assert filled.all(), f"{folder}: {name} has elements that no file holds"
        tensors[name] = whole
    return tensors, manifest["state"]


def plain_manifest(folder: Path) -> dict[str, Any]:
    """Returns a manifest's fields, with each tensor's blocks by file in its entry."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    for field in ("blocks_size", "blocks_xxh3_128", "xxh3_128"):
        del manifest[field]
    files = list(manifest["files"])
    for name, blocks in manifest.pop("blocks").items():
        entry = manifest["tensors"][name]
        entry["blocks"] = blocks if isinstance(blocks, dict) else cells(blocks, entry, files)
    return manifest


def cells(grid: list[Any], entry: dict[str, Any], files: list[str]) -> dict[str, Any]:
    """Returns the blocks of a grid: where it cuts each dimension, and the file of each cell."""
    cuts, numbers = grid
    ends = [[*begins[1:], size] for begins, size in zip(cuts, entry["shape"], strict=True)]
    places = itertools.product(*(range(len(begins)) for begins in cuts))
    return {
        files[number]: [
            [begins[i] for begins, i in zip(cuts, place, strict=True)],
            [e[i] - b[i] for b, e, i in zip(cuts, ends, place, strict=True)],
        ]
        for number, place in zip(numbers, places, strict=True)
    }


def digest(folder: Path) -> str:
    """Returns a hash of all tensors and the state of a checkpoint, whatever files hold them."""
    tensors, state = read_plainly(folder)
    content = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(as_bytes(tensor).numpy().data)
    return content.hexdigest()


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Returns whether two sets of tensors are the same, bit for bit."""
    return ours.keys() == theirs.keys() and all(
        a.dtype == theirs[name].dtype
        and a.shape == theirs[name].shape
        and torch.equal(as_bytes(a), as_bytes(theirs[name]))
        for name, a in ours.items()
    )


def as_bytes(tensor: Tensor) -> Tensor:
    """Returns the bytes of a tensor in the host's memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def drawn(*, attempt: int, step: int, rows: int = 64) -> dict[str, Tensor]:
    """Returns the tensors of an attempt at a step, different from those of any other."""
    numbers = torch.Generator().manual_seed(attempt * 10**6 + step)
    return {f"model.{name}": torch.randn(rows, 256, generator=numbers) for name in "abcdef"}
