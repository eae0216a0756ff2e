"""The index of a shard folder: what it holds, how it was made, and the hashes to check it by.

Owns the format of `index.json` and of the tables of documents beside the shards. Leaves the
shards to `shards`, and whether the files agree with the index to `reader`.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_pipeline.settings import DataError, OnCorrupt, SourceSettings
from data_pipeline.tokenizers import token_dtype

FORMAT_VERSION = 2
INDEX_NAME = "index.json"
SPLITS = ("train", "validation")

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TokenizerEntry:
    """The tokenizer that made the tokens; `fingerprint` is a SHA-256 in hex.

    `file` is the `tokenizer.json` in the folder, None where the name says all.
    """

    name: str
    vocab_size: int
    end_of_document: int
    fingerprint: str
    file: str | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ShardEntry:
    """One tar of documents, and the table that says where in it each document's tokens are.

    `documents` names a `.npy` of int64 [num_documents, 3]: the byte offset of a document's tokens
    in the tar, their number (the end of the document included), and the CRC-32 of their bytes.
    In a folder of text it is the same of the UTF-8 text and its bytes, and `num_tokens` is 0.
    `num_bytes` counts UTF-8 text.
    """

    file: str
    size: int
    sha256: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    documents: str
    documents_sha256: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SplitEntry:
    """One split of a source. `num_bytes` counts UTF-8 text, `num_tokens` ends of documents too."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Baselines:
    """What simple models reach on the validation text, in bits per byte; None where it is empty."""

    byte_bigram_bits_per_byte: float | None
    zlib_bits_per_byte: float | None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SourceEntry:
    """One source of documents; `num_left_out` counts documents by reason."""

    name: str
    description: str
    language: str | None
    licence: str | None
    num_left_out: dict[str, int]
    splits: dict[str, SplitEntry]
    baselines: Baselines


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BuildEntry:
    """The settings that decide what a folder holds; the number of processes isn't one."""

    sources: dict[str, SourceSettings]
    tokenizer: str
    end_of_document: str | None
    validation_fraction: float
    shard_tokens: int
    on_corrupt: OnCorrupt


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Index:
    """All of `index.json`; `dtype` is numpy's name of the tokens' little-endian type.

    Both it and `tokenizer` are None in a folder of text.
    """

    format_version: int
    build: BuildEntry
    tokenizer: TokenizerEntry | None
    dtype: str | None
    sources: tuple[SourceEntry, ...]


def write_index(index: Index, folder: Path) -> None:
    """Writes `index.json`; the last file of a folder to be written."""
    (folder / INDEX_NAME).write_text(json.dumps(asdict(index), indent=1) + "\n", encoding="utf-8")


def read_index(folder: Path) -> Index:
    """The index of a shard folder.

    Raises DataError where there is none, where it is of another format version, where it is not
    well formed, and where it names a file outside the folder.
    """
    path = folder / INDEX_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder} is not a shard folder: it has no {INDEX_NAME}; make one with "
            f"'python -m data_pipeline.build corpus=stdlib tokenizer=bytes to={folder}'"
        ) from None
    try:
        record = json.loads(text)
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version!r}, and this program reads "
                f"{FORMAT_VERSION}; build the folder again"
            )
        index: Index = TypeAdapter(Index).validate_python(record)
    except DataError:
        raise
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is damaged: {where}: {first['msg']}; build it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error!r}; build it again") from error
    _check_sense(index, path)
    return index


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sense(index: Index, path: Path) -> None:
    dtype = index.tokenizer and token_dtype(index.tokenizer.vocab_size).name
    if index.dtype != dtype:
        raise DataError(
            f"{path} is damaged: dtype {index.dtype!r}, where "
            f"{index.tokenizer and index.tokenizer.name} is stored as {dtype!r}; build it again"
        )
    if not index.sources:
        raise DataError(f"{path} is damaged: it has no sources; build it again")
    for source in index.sources:
        if set(source.splits) != set(SPLITS):
            raise DataError(f"{path} is damaged: {source.name} has splits {list(source.splits)}")
        for split in source.splits.values():
            for shard in split.shards:
                for name in (shard.file, shard.documents):
                    if Path(name).name != name or name == "..":
                        raise DataError(f"{path} names {name!r}, which is outside its folder")
