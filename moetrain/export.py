"""`python -m moetrain.export run=DIR to=DIR`: a run's newest good checkpoint for Hugging Face.

Owns the command: which checkpoint, where to, and what is said. Leaves the files to
`moetrain.huggingface`.
"""

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from data_pipeline.progress import byte_progress
from data_pipeline.quantities import decimal_size
from data_pipeline.settings import PathText
from moetrain.checkpoint.chosen import chosen_checkpoint
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.checks import one_of
from moetrain.command import run_command
from moetrain.huggingface.families import family_of
from moetrain.huggingface.model_card import write_model_card
from moetrain.huggingface.model_files import (
    DTYPES,
    export_dtype,
    exportable_places,
    exported_dtypes,
    write_model,
)
from moetrain.huggingface.new_folder import exit_code, new_folder, require_new
from moetrain.huggingface.shards import num_bytes
from moetrain.huggingface.tokenizer import NONE, write_tokenizer
from moetrain.settings.validation import validated_run


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ExportSettings:
    """Which checkpoint is exported, and how."""

    run: PathText
    """The run's own folder."""
    to: PathText
    """The folder to make."""
    step: NonNegativeInt | None = None
    """None: that of the newest good checkpoint."""
    dtype: Annotated[str, AfterValidator(one_of("auto", *DTYPES))] = "auto"
    """auto: that of the model that was imported, else what the run multiplied in."""
    max_shard_bytes: PositiveInt = 5_000_000_000
    """What the tensors of one file have at most."""
    tokenizer: PathText | None = None
    """A name, the path of a tokenizer's file, or `none` for a folder without one; None: the one
    that the run was trained with."""
    drop_router_bias: bool = False
    """Whether the routers' selection biases may be left out, where transformers has no place for
    them."""
    extensions: list[str] = field(default_factory=list)
    """Extensions that the run was trained with; a checkpoint alone can't cause an import."""


def export(settings: ExportSettings) -> int:
    """Exports a run; returns the exit code."""
    return exit_code(lambda: _export(settings), command="moetrain.export")


def _export(settings: ExportSettings) -> None:
    require_new(Path(settings.to), num_bytes=0)  # said before a large run's files are checked
    folder = chosen_checkpoint(Path(settings.run), step=settings.step)
    with CheckpointReader(folder) as reader:
        _write(settings, folder, reader)


def _write(settings: ExportSettings, folder: Path, reader: CheckpointReader) -> None:
    run_dir, to, manifest = Path(settings.run), Path(settings.to), reader.manifest
    config = validated_run(manifest.config)
    placed = exportable_places(reader, config.model, drop_router_bias=settings.drop_router_bias)
    dtype = export_dtype(settings.dtype, manifest)
    size = num_bytes(placed, exported_dtypes(reader, placed, dtype=dtype))
    require_new(to, num_bytes=size)

    with new_folder(to) as staged:
        tokens = write_tokenizer(
            staged,
            config=config,
            tokenizer=settings.tokenizer,
            fingerprint=manifest.state.get("tokenizer") or None,
            token_ids=manifest.state.get("imported_token_ids"),
            run_dir=run_dir,
        )
        write_model_card(
            staged,
            run_dir=run_dir,
            manifest=manifest,
            config=config,
            dtype=dtype,
            has_tokenizer=settings.tokenizer != NONE,
            begins_texts=tokens.begins_texts,
        )
        with byte_progress("exporting", num_bytes=size, shown=True) as progress:
            files = write_model(
                staged,
                reader,
                model=config.model,
                placed=placed,
                dtype=dtype,
                max_shard_bytes=settings.max_shard_bytes,
                bos_token_id=tokens.bos_token_id,
                eos_token_id=tokens.eos_token_id,
                advance=progress.advance,
            )
    kind = family_of(config.model).architecture
    print(
        f"exported  {folder} as {kind}: {len(placed)} tensors of {dtype}, {decimal_size(size)} in "
        f"{len(files)} {'file' if len(files) == 1 else 'files'}\n"
        f"to        {to}\n"
        f"next      AutoModelForCausalLM.from_pretrained({str(to)!r}), or vllm serve {to}"
    )


if __name__ == "__main__":
    run_command(export, tree=ExportSettings, module="moetrain.export")
