"""The weights of a Hugging Face folder, written: cut into files, each tensor streamed.

Owns which tensor goes into which file, and the index of the files. Leaves a file's format to
`moetrain.checkpoint`, and what the tensors are called to `names.py`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moetrain.checkpoint.tensor_files import TensorFileWriter, cut_into_files
from moetrain.huggingface.names import ConversionError, TensorPlace
from moetrain.huggingface.weights import INDEX, SINGLE

METADATA = {"format": "pt"}  # transformers refuses a file without it


def num_bytes(placed: Sequence[TensorPlace], dtypes: Mapping[str, torch.dtype]) -> int:
    """Returns the size of all tensors in the dtypes of their names."""
    return sum(math.prod(p.theirs_shape) * dtypes[p.theirs].itemsize for p in placed)


def write_shards(
    to: Path,
    placed: Sequence[TensorPlace],
    *,
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int,
    read: Callable[[TensorPlace], Tensor],
) -> list[str]:
    """Writes one tensor for each place, and returns the names of the files.

    `dtypes` are by name. `read` gives a place's tensor the way theirs is; no more than one is held.
    No file has more than `max_shard_bytes` of tensors, unless it is of one alone. Raises
    ConversionError for a number that the dtype can't hold.
    """
    shards = cut_into_files(
        placed, size=lambda place: num_bytes([place], dtypes), max_file_bytes=max_shard_bytes
    )
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if len(names) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        entries = {place.theirs: (dtypes[place.theirs], place.theirs_shape) for place in shard}
        with TensorFileWriter(to / name, entries, metadata=METADATA) as file:
            for place in shard:
                tensor = _rounded(read(place), dtypes[place.theirs], name=place.theirs)
                file.write(place.theirs, tensor)
    if len(names) > 1:
        index = {
            "metadata": {"total_size": num_bytes(placed, dtypes)},
            "weight_map": {
                place.theirs: name
                for name, shard in zip(names, shards, strict=True)
                for place in shard
            },
        }
        (to / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


def _rounded(tensor: Tensor, dtype: torch.dtype, *, name: str) -> Tensor:
    rounded = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise ConversionError(f"{name} has NaN or infinity in the checkpoint: use another step")
    if not rounded.isfinite().all():
        raise ConversionError(
            f"{name} has a number that {str(dtype).removeprefix('torch.')} can't hold: "
            f"{tensor.abs().max():g} is above {torch.finfo(dtype).max:g}: use dtype=float32"
        )
    return rounded
