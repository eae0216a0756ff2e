"""`python -m moetrain.import_hf from=DIR to=DIR`: a Hugging Face model becomes a run's folder.

`from=` may also name a model on the Hub, which is fetched.

Owns the command: its order of work and its messages. Leaves names, configuration and files to
`moetrain.huggingface`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from data_pipeline.commands.shell import text_setting
from data_pipeline.progress import byte_progress
from data_pipeline.settings import PathText
from moetrain.checks import ConfigError
from moetrain.command import run_command
from moetrain.huggingface.configuration import imported_model
from moetrain.huggingface.hub import fetch_model, is_hub_name
from moetrain.huggingface.names import (
    ConversionError,
    Index,
    TensorPlace,
    model_tensors,
    require_complete,
)
from moetrain.huggingface.new_folder import exit_code, new_folder, require_new
from moetrain.huggingface.reading import matched, read_config
from moetrain.huggingface.run_folder import starting_config, training_command, write_run
from moetrain.huggingface.weights import WeightFiles, read_as_ours
from moetrain.kinds import EventKind
from moetrain.model import total_parameters
from moetrain.observe import EventLog

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "tekken.json",
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ImportSettings:
    """What is imported, and where to."""

    from_: PathText
    """A folder of transformers' or the Hub's, with config.json and safetensors; or the name of a
    model on the Hub, which is fetched."""
    to: PathText
    """The run's folder to make."""
    revision: str | None = None
    """A branch, tag or commit of a model on the Hub; None: its main one."""
    cache_dir: PathText | None = None
    """Where what is fetched is kept; None: where the Hub's own library keeps it (HF_HOME)."""


def import_folder(settings: ImportSettings) -> int:
    """Imports a folder; returns the exit code."""
    return exit_code(lambda: _import(settings), command="moetrain.import_hf")


def _import(settings: ImportSettings) -> None:
    to = Path(os.path.abspath(settings.to))
    require_new(to, num_bytes=0)  # said before anything is fetched
    try:
        _write(_source(settings), to, settings)
    except ConversionError as error:
        raise ConfigError("from", settings.from_, str(error)) from error


def _source(settings: ImportSettings) -> Path:
    """Returns the folder to import, fetched if it is a model on the Hub."""
    name = settings.from_
    if is_hub_name(name):
        return fetch_model(
            name,
            revision=settings.revision,
            cache_dir=settings.cache_dir,
            others=TOKENIZER_FILES,
            demand=lambda folder: imported_model(read_config(folder)),
        )
    for key in ("revision", "cache_dir"):
        if (value := getattr(settings, key)) is not None:
            raise ConfigError(
                key, value, f"is for models on the Hub, and from={name} is a folder: leave it out"
            )
    if not Path(name).is_dir():
        raise ConfigError(
            "from",
            name,
            "is no folder: use one with config.json and safetensors, or the name of a model on the "
            "Hugging Face Hub, such as mistralai/Mixtral-8x7B-v0.1",
        )
    return Path(name)


def _write(source: Path, to: Path, settings: ImportSettings) -> None:
    imported = imported_model(read_config(source))
    with WeightFiles(source) as files:
        placed = matched(files, imported)
        shapes = model_tensors(imported.settings)
        require_complete(placed, shapes)
        notes = [*imported.notes, *_notes(files, placed)]
        dtypes = _dtypes(files, placed)
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # holds all of them exactly
        tokenizer = sorted({p for glob in TOKENIZER_FILES for p in source.glob(glob)})
        tokenizer = [path for path in tokenizer if path.is_file()]
        has_tokenizer = (source / "tokenizer.json").is_file()
        config = starting_config(imported.settings, to=to, has_tokenizer=has_tokenizer)
        size = 4 * total_parameters(imported.settings)
        require_new(to, num_bytes=size)
        by_name: dict[str, list[TensorPlace]] = {}
        for place in placed:
            by_name.setdefault(place.ours, []).append(place)
        with (
            new_folder(to) as staged,
            byte_progress("importing", num_bytes=size, shown=True) as progress,
        ):
            if tokenizer:
                (staged / "tokenizer").mkdir()
            for path in tokenizer:
                shutil.copyfile(path, staged / "tokenizer" / path.name)

            def read(name: str, index: Index) -> Tensor:
                if name not in by_name:  # a selection bias, which its class has not
                    return torch.zeros(shapes[name])[index]
                part = read_as_ours(files, by_name[name], shape=shapes[name], index=index)
                progress.advance(part.numel() * part.element_size())
                return part

            write_run(
                staged,
                config,
                to=to,
                has_tokenizer=has_tokenizer,
                state={
                    "imported_dtype": str(dtype).removeprefix("torch."),
                    "imported_token_ids": imported.token_ids,
                },
                read=read,
            )
            event = EventLog(staged / "events.jsonl").write
            event(EventKind.import_, **_origin(source, settings), tensors=len(files.tensors))
    for text in imported.carried:
        print(f"carried   {text}")
    for note in notes:
        print(f"note      {note}")
    print(
        f"imported  {settings.from_}: {len(files.tensors)} tensors, "
        f"{total_parameters(imported.settings):,} parameters\n"
        f"to        {to}, as step 0 of a run\n"
        f"next      {training_command(to)} data.dir=SHARDS"
    )
    if has_tokenizer:
        print(f"shards    {shards_command(to)}")


def shards_command(to: Path) -> str:
    """Returns the command that makes shards of some text for an imported model."""
    tokenizer = text_setting("tokenizer", str(to / "tokenizer"))
    return f"python -m data_pipeline.build {tokenizer} corpus=TEXT to=SHARDS"


def _origin(source: Path, settings: ImportSettings) -> dict[str, str]:
    if is_hub_name(settings.from_):
        return {"source": settings.from_, "commit": source.name}
    return {"source": str(source.absolute())}


def _dtypes(files: WeightFiles, placed: list[TensorPlace]) -> set[torch.dtype]:
    """Returns the dtypes of the weights, but for routers, which may be float32 beside others."""
    return {files.tensors[place.theirs].dtype for place in placed if not place.routes}


def _notes(files: WeightFiles, placed: list[TensorPlace]) -> Iterator[str]:
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in _dtypes(files, placed))
    if len(dtypes) > 1:
        yield f"its weights are {' and '.join(dtypes)}: an export will have them all in float32"
    used = {stored.file for stored in files.tensors.values()}
    if unused := sorted({p.name for p in files.folder.glob("*.safetensors")} - used):
        yield f"{', '.join(unused)} in {files.folder} belong to no model there and were not read"
    if given := _generation_settings(files.folder / "generation_config.json"):
        yield f"its generation_config.json is not carried: {', '.join(given)}"


def _generation_settings(path: Path) -> list[str]:
    """Returns what a folder sets for generation, beside special tokens, which config.json has."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    plain = ("_from_model_config", "transformers_version", "bos_token_id", "eos_token_id")
    found = found if isinstance(found, dict) else {}
    return sorted(key for key, value in found.items() if value and key not in plain)


if __name__ == "__main__":
    run_command(import_folder, tree=ImportSettings, module="moetrain.import_hf")
