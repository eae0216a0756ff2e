"""`python -m moetrain.export run=DIR to=DIR`: a run's newest good checkpoint for Hugging Face.

Owns the command: which checkpoint, in which dtype, what is refused and what is said. Leaves names,
configuration and files to `moetrain.huggingface`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, ConfigDict, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from data_pipeline import DataError
from data_pipeline.progress import byte_progress
from moetrain.checkpoint import (
    CheckpointError,
    CheckpointReader,
    Manifest,
    newest_good,
    read_manifest,
    verify_files,
)
from moetrain.checks import ConfigError, one_of
from moetrain.command import BAD_CONFIGURATION, DONE, FAILED, run_command
from moetrain.config import Config, validated
from moetrain.huggingface.configuration import config_json, demand_expressible
from moetrain.huggingface.model_card import write_model_card
from moetrain.huggingface.names import (
    ConversionError,
    Place,
    demand_complete,
    is_selection_bias,
    model_tensors,
    places,
)
from moetrain.huggingface.new_folder import demand_new, new_folder
from moetrain.huggingface.shards import num_bytes, write_shards
from moetrain.huggingface.tokenizer import write_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ExportSettings:
    """Which checkpoint is exported, and how."""

    run: str
    """The run's own folder."""
    to: str
    """The folder to make."""
    step: NonNegativeInt | None = None
    """None: that of the newest good checkpoint."""
    dtype: Annotated[str, AfterValidator(one_of("auto", *DTYPES))] = "auto"
    """auto: that of the model that was imported, else what the run multiplied in."""
    max_shard_bytes: PositiveInt = 5_000_000_000
    """What the tensors of one file have at most."""
    tokenizer: str | None = None
    """A name, or the path of a tokenizer's file; None: the one that the run was trained with."""
    drop_router_bias: bool = False
    """Whether the routers' selection biases, which Mixtral has not, may be left out."""


def export(settings: ExportSettings) -> int:
    """Exports a run; returns the exit code."""
    try:
        folder = _checkpoint(Path(settings.run), settings.step)
        with CheckpointReader(folder) as reader:
            _export(settings, folder, reader)
    except (ConfigError, DataError, ConversionError) as error:
        print(f"moetrain.export: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    except (CheckpointError, OSError) as error:
        print(f"moetrain.export: {error}", file=sys.stderr)
        return FAILED
    return DONE


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    """Returns the folder of the checkpoint to export, its files verified."""
    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        raise ConfigError("run", run_dir, "has no checkpoints/: use the own folder of a run")
    _say(f"checking the files of a checkpoint in {directory}")
    if step is None:
        found = newest_good(
            directory, rejected=lambda name, why: _say(f"passing over {name}: {why}")
        )
        if found is None:
            raise ConfigError("run", run_dir, "has no good checkpoint: use another run")
        return found
    folder = directory / f"step_{step:08d}"
    if not folder.is_dir():
        there = ", ".join(str(int(p.name[5:])) for p in sorted(directory.glob("step_????????*")))
        raise ConfigError(
            "step", step, f"{directory} has no such step: use one of {there or 'none'}"
        )
    verify_files(folder, read_manifest(folder))
    return folder


def _export(settings: ExportSettings, folder: Path, reader: CheckpointReader) -> None:
    manifest, to = reader.manifest, Path(settings.to)
    config = validated(manifest.config, Config)
    demand_expressible(config.model)
    placed = list(places(config.model))
    _demand_complete(manifest, config, placed)
    _demand_no_bias(reader, dropped=settings.drop_router_bias)
    dtype = _dtype(settings.dtype, manifest)
    size = num_bytes(placed, DTYPES[dtype])
    demand_new(to, num_bytes=size)
    with (
        new_folder(to) as staged,
        byte_progress("exporting", num_bytes=size, shown=True) as progress,
    ):
        tokens = write_tokenizer(
            staged,
            config=config,
            tokenizer=settings.tokenizer,
            fingerprint=manifest.state.get("tokenizer") or None,
        )
        ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
        _write_json(staged / "config.json", config_json(config.model, dtype=dtype, **ids))
        _write_json(staged / "generation_config.json", {"_from_model_config": True, **ids})
        write_model_card(
            staged, run_dir=Path(settings.run), manifest=manifest, config=config, dtype=dtype
        )

        def read(place: Place) -> Tensor:
            part = reader.read(place.ours, place.ours_index)
            part = part.reshape(part.shape[-2:])  # of a stack, one expert's matrix
            progress.advance(part.numel() * DTYPES[dtype].itemsize)
            return part.t() if place.transposed else part

        files = write_shards(
            staged,
            placed,
            dtype=DTYPES[dtype],
            max_shard_bytes=settings.max_shard_bytes,
            read=read,
        )
    kind = "Mixtral" if config.model.is_moe else "Mistral"
    print(
        f"exported  {folder} as {kind}: {len(placed)} tensors of {dtype}, {size / 1e9:.3g} GB in "
        f"{len(files)} {'file' if len(files) == 1 else 'files'}\n"
        f"to        {to}\n"
        f"next      AutoModelForCausalLM.from_pretrained({str(to)!r}), or vllm serve {to}"
    )


def _demand_complete(manifest: Manifest, config: Config, placed: Sequence[Place]) -> None:
    """Raises ConversionError unless the checkpoint is of this model, and all of it has a place."""
    saved = {n: entry.shape for n, entry in manifest.tensors.items() if n.startswith("model.")}
    expected = model_tensors(config.model)
    for name in sorted(saved.keys() ^ expected.keys()):
        why = "is not in the model" if name in saved else "is not in the checkpoint"
        raise ConversionError(f"{name} {why} of this configuration, and all must be exported")
    if wrong := [name for name, shape in saved.items() if shape != expected[name]]:
        name = wrong[0]
        raise ConversionError(f"{name} is {list(saved[name])} and not {list(expected[name])}")
    demand_complete(placed, saved)


def _demand_no_bias(reader: CheckpointReader, *, dropped: bool) -> None:
    """Raises ConfigError where a router chooses experts by a bias, which Mixtral has not."""
    for name in filter(is_selection_bias, reader.manifest.tensors):
        bias = reader.read(name)
        if bias.any() and not dropped:
            expert = int(bias.abs().argmax())
            raise ConfigError(
                "drop_router_bias",
                False,
                f"{name} is {bias[expert]:.4g} for expert {expert}, and Mixtral has no selection "
                "bias: what is exported would choose other experts than were trained; use "
                "drop_router_bias=true to leave the biases out all the same",
            )


def _dtype(wanted: str, manifest: Manifest) -> str:
    if wanted != "auto":
        return wanted
    known: Mapping[str, str] = {**manifest.mesh, **manifest.state}
    found = known.get("imported_dtype") or known.get("compute_dtype")
    return found if found in DTYPES else "float32"


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    run_command(export, tree=ExportSettings, module="moetrain.export")
