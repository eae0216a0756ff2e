"""A checkpoint's model as Hugging Face files: config.json, generation_config.json, safetensors.

Checks that all of the model is written, without loss. Leaves tokenizer and model card to their own
files.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.checks import ConfigError
from moetrain.huggingface.configuration import config_json
from moetrain.huggingface.families import family_of
from moetrain.huggingface.names import (
    ConversionError,
    TensorPlace,
    is_selection_bias,
    model_tensors,
    places,
    require_complete,
)
from moetrain.huggingface.shards import write_shards
from moetrain.settings import ModelSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def exportable_places(
    reader: CheckpointReader, model: ModelSettings, *, drop_router_bias: bool
) -> list[TensorPlace]:
    """Returns the places of all tensors of a checkpoint's model in a Hugging Face folder.

    Raises ConfigError for a model that no class of transformers computes, or whose routers choose
    with a bias that its class hasn't and that is not to be dropped, and ConversionError where the
    checkpoint doesn't hold the model that its configuration says, all of it and nothing else.
    """
    family = family_of(model)
    placed = list(places(model, family))
    saved = {
        name: entry.shape
        for name, entry in reader.manifest.tensors.items()
        if not name.startswith("optimizer.")
    }
    expected = model_tensors(model)
    for name in sorted(saved.keys() ^ expected.keys()):
        where = (
            "checkpoint, and not in the model"
            if name in saved
            else "model, and not in the checkpoint"
        )
        raise ConversionError(f"{name} is in the {where}: all of it must be exported")
    for name, shape in saved.items():
        if shape != expected[name]:
            raise ConversionError(f"{name} is {list(shape)} and not {list(expected[name])}")
    require_complete(placed, saved)
    if not drop_router_bias and not family.has_selection_bias:
        _require_no_bias(reader, family.architecture)
    return placed


def _require_no_bias(reader: CheckpointReader, architecture: str) -> None:
    for name in filter(is_selection_bias, reader.manifest.tensors):
        bias = reader.read(name)
        if bias.any():
            expert = int(bias.abs().argmax())
            raise ConfigError(
                "drop_router_bias",
                False,
                f"{name} is {bias[expert]:.4g} for expert {expert}, and {architecture} has no "
                "selection bias (a model with model.router.score_function=sigmoid has): what is "
                "exported would choose other experts than were trained; use drop_router_bias=true "
                "to leave the biases out all the same",
            )


def export_dtype(wanted: str, manifest: Manifest) -> str:
    """Returns the dtype that `auto` means: of the weights imported, else what was multiplied in."""
    if wanted != "auto":
        return wanted
    found = manifest.state.get("imported_dtype") or manifest.mesh.get("compute_dtype")
    return found if found in DTYPES else "float32"


def write_model(
    to: Path,
    reader: CheckpointReader,
    *,
    model: ModelSettings,
    placed: Sequence[TensorPlace],
    dtype: str,
    max_shard_bytes: int,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
    advance: Callable[[int], None],
) -> list[str]:
    """Writes the files of a model into a folder that is there; returns the names of its weights'.

    Routers are float32 where the dtype doesn't hold them exactly: a rounded router chooses other
    experts (docs/checkpoints.md). `advance` is called with the bytes written. One tensor is in
    memory at a time, of experts one matrix. Raises ConversionError for a number that the dtype
    can't hold.
    """
    ids: dict[str, Any] = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    _write_json(to / "config.json", config_json(model, dtype=dtype, **ids))
    _write_json(to / "generation_config.json", {"_from_model_config": True, **ids})

    dtypes = exported_dtypes(reader, placed, dtype=dtype)

    def read(place: TensorPlace) -> Tensor:
        part = _as_theirs(reader, place)
        advance(part.numel() * dtypes[place.theirs].itemsize)
        return part

    return write_shards(to, placed, dtypes=dtypes, max_shard_bytes=max_shard_bytes, read=read)


def exported_dtypes(
    reader: CheckpointReader, placed: Sequence[TensorPlace], *, dtype: str
) -> dict[str, torch.dtype]:
    """Returns the dtype of each tensor of theirs, by its name, where the others are `dtype`."""

    def of(place: TensorPlace) -> torch.dtype:
        if not place.routes:
            return DTYPES[dtype]
        tensor = _as_theirs(reader, place)
        holds = torch.equal(tensor.to(DTYPES[dtype]).float(), tensor)
        # Theirs keep a selection bias in float32 whatever the dtype of the rest.
        return DTYPES[dtype] if holds and not is_selection_bias(place.ours) else torch.float32

    return {place.theirs: of(place) for place in placed}


def _as_theirs(reader: CheckpointReader, place: TensorPlace) -> Tensor:
    """Returns a place's tensor the way theirs is, in float32."""
    if not place.ours:
        return torch.zeros(place.theirs_shape)
    part = reader.read(place.ours, place.ours_index)
    if place.ours_index:
        part = part.reshape(part.shape[-2:])  # of a stack, one expert's matrix
    part = part.t() if place.transposed else part
    return part if place.factor == 1.0 else part * place.factor


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
