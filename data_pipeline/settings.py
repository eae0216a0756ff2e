"""What a user may say about data, and the error for what was said wrong.

Owns the settings' names, types, defaults and bounds. Leaves their meaning to the files that use
them, and the reading of command lines to `command`. The types are those that
`OmegaConf.structured` digests, so that Hydra can use the classes as schemas.
"""

import re
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(gt=0)]

_STRICT = ConfigDict(extra="forbid")


class DataError(ValueError):
    """Data, or a setting about data, that can't be used; the message names it and a way out."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataSettings:
    """The `data.*` part of the training configuration.

    `dir` is a folder of shards that exists. Without it the shards of `corpus` and `tokenizer` are
    taken from `data/` in the working directory, and built there when missing.
    """

    dir: str | None = None
    corpus: str = "stdlib"
    tokenizer: str = "bytes"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BuildSettings:
    """The settings of `python -m data_pipeline.build`.

    `corpus` is `stdlib`, a folder of text files, a text file, or a `.jsonl`/`.jsonl.gz` file.
    `to` is the folder to make. `validation_fraction` is the share of documents held out,
    `shard_tokens` the number of tokens at which a shard is full. `num_processes` tokenise; none
    given: as many as there are cores, where the tokenizer is slow enough to need them. `name`,
    `language` and `licence` describe the source in the index.
    """

    corpus: str
    tokenizer: str
    to: str
    validation_fraction: Fraction = 0.05
    shard_tokens: Count = 2**24
    num_processes: Count | None = None
    name: str | None = None
    language: str | None = None
    licence: str | None = None


def resolved_dir(settings: DataSettings) -> Path:
    """The absolute path of the shard folder that the settings mean, there or not."""
    if settings.dir is not None:
        return Path(settings.dir).absolute()
    return Path("data", f"{source_name(settings.corpus)}-{settings.tokenizer}").absolute()


def source_name(corpus: str) -> str:
    """A name for a corpus that is safe in file names and metric names: `My Text.jsonl` → `My-Text`.

    Raises DataError where nothing of the corpus's own name is left.
    """
    stem = re.sub(r"(\.jsonl)?(\.gz)?$", "", Path(corpus).absolute().name)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem.removesuffix(".txt")).strip("-")
    if not name:
        raise DataError(f"corpus={corpus!r} gives no name for its source; give one with name=NAME")
    return name
