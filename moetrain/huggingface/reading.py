"""A folder of transformers' or the Hub's, read as a model of ours."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.huggingface.configuration import ImportedModel, imported_model
from moetrain.huggingface.names import (
    EMBEDDING,
    HEAD,
    WHOLE,
    ConversionError,
    TensorPlace,
    model_tensors,
    places,
    require_complete,
)
from moetrain.huggingface.weights import WeightFiles, match, read_as_ours, require_zeros
from moetrain.settings import ModelSettings


def read_model(folder: Path) -> tuple[ModelSettings, dict[str, Tensor]]:
    """Returns a model's settings and all of its tensors, in float32, by their names in the model.

    Raises ConversionError where the folder holds no such model, or it can't be read.
    """
    imported = imported_model(read_config(folder))
    with WeightFiles(folder) as files:
        placed = matched(files, imported)
        shapes = model_tensors(imported.settings)
        require_complete(placed, shapes)
        by_name: dict[str, list[TensorPlace]] = {}
        for place in placed:
            by_name.setdefault(place.ours, []).append(place)
        tensors = {
            name.removeprefix("model."): read_as_ours(
                files, by_name[name], shape=shape, index=WHOLE
            )
            if name in by_name
            else torch.zeros(shape)  # a selection bias
            for name, shape in shapes.items()
        }
    return imported.settings, tensors


def read_config(source: Path) -> dict[str, Any]:
    """Returns what a folder's config.json says; ConversionError where it can't be read."""
    path = source / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} can't be read: {error}") from None
    if not isinstance(config, dict):
        raise ConversionError(f"{path} is no JSON object")
    return config


def matched(files: WeightFiles, imported: ImportedModel) -> list[TensorPlace]:
    """Returns the places of the model in the form in which the folder has them.

    Raises ConversionError where the folder holds more, less or something else.
    """
    settings, family = imported.settings, imported.family
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in files.tensors)
    if settings.tie_embeddings and HEAD in files.tensors:
        if not torch.equal(files.read(EMBEDDING), files.read(HEAD)):
            raise ConversionError(
                f"config.json: tie_word_embeddings=true, and {HEAD} is not {EMBEDDING}: which of "
                "them is the head can't be known"
            )
        del files.tensors[HEAD]
    for name in files.beyond(settings.num_layers, imported.extra_layers):
        del files.tensors[name]
    placed = match(files, places(settings, family, fused=fused))
    require_zeros(files, placed)
    return placed
