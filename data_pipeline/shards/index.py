"""The index of a shard folder: what it holds, how it was made, and the hashes to verify it with.

Owns the format of `index.json` and of the tables of documents next to the shards. Leaves the
shards to `writer`, and checking the files against the index to `reader`.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_pipeline.corpora.raw_documents import as_utf8
from data_pipeline.settings import (
    SOURCE_NAME,
    Count,
    DataError,
    Fraction,
    Natural,
    OnCorrupt,
    Sha256,
    SourceSettings,
)
from data_pipeline.shards.missing_shards import no_shards
from data_pipeline.storage import ShardFiles
from data_pipeline.tokenizers.tokenizer import TokenizerEntry, token_dtype

FORMAT_VERSION = 2
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "validation")
# A table of documents is a .npy of format 1.0: this header, then three int64 per document.
TABLE_HEADER_BYTES = 128

BitsPerByte = Annotated[float, Field(ge=0.0)]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ShardEntry:
    """One tar of documents, and the table that says where in it each document's tokens are.

    `documents` names a `.npy` of int64 [num_documents, 3]: the byte offset of a document's tokens
    in the tar, their number (the end of the document included), and the CRC-32 of their bytes.
    `num_bytes` counts UTF-8 text.
    """

    file: str
    size: Count
    sha256: Sha256
    num_documents: Count
    num_tokens: Count
    num_bytes: Count
    documents: str
    documents_sha256: Sha256


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SplitEntry:
    """One split of a source. `num_bytes` counts UTF-8 text, `num_tokens` also ends of documents."""

    num_documents: Natural
    num_tokens: Natural
    num_bytes: Natural
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Baselines:
    """What simple models reach on the validation text, in bits per byte; None if it is empty."""

    byte_bigram_bits_per_byte: BitsPerByte | None
    zlib_bits_per_byte: BitsPerByte | None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SourceEntry:
    """One source of documents; `num_left_out` counts what was left out, by reason.

    `left_out_examples` names the first few of each. `unknown_endings` counts, by file suffix, the
    documents that were read as plain text although their suffix is unknown. `ending_examples` names
    the first few.
    """

    name: Annotated[str, Field(pattern=SOURCE_NAME)]
    description: str
    language: str | None
    licence: str | None
    num_left_out: dict[str, Natural]
    left_out_examples: dict[str, tuple[str, ...]]
    unknown_endings: dict[str, Natural]
    ending_examples: dict[str, tuple[str, ...]]
    splits: dict[str, SplitEntry]
    baselines: Baselines


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TextEntry(SourceSettings):
    """A source's settings, as a record: the path is the build machine's, for information only."""

    corpus: str
    text_field: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BuildEntry:
    """The settings that decide what a folder holds; the number of processes isn't one."""

    sources: dict[str, TextEntry]
    tokenizer: str
    end_of_document: str | None
    validation_fraction: Fraction
    shard_tokens: Count
    on_corrupt: OnCorrupt
    max_document_bytes: Count | None = None
    """None: the default."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Index:
    """The content of `index.json`; `dtype` is numpy's name of the tokens' little-endian type."""

    format_version: int
    build: BuildEntry
    tokenizer: TokenizerEntry
    dtype: str
    sources: tuple[SourceEntry, ...]


def write_index(index: Index, folder: Path) -> None:
    """Writes `index.json`, the last file of a folder to be written."""
    fields = asdict(index)
    if fields["build"]["max_document_bytes"] is None:
        del fields["build"]["max_document_bytes"]  # for readers of before there was this field
    content = json.dumps(encodable(fields), indent=1) + "\n"
    (folder / INDEX_NAME).write_text(content, encoding="utf-8")


def encodable(value: Any) -> Any:
    """The same plain value with all strings encodable as UTF-8, as `index.json` needs them."""
    if isinstance(value, str):
        return as_utf8(value)
    if isinstance(value, dict):
        return {key: encodable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(encodable, value))
    return value


def read_index(files: ShardFiles) -> Index:
    """The index of a shard folder; raises DataError if it is missing or invalid."""
    where = files.location
    try:
        text = files.read_bytes(INDEX_NAME)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(no_shards(where)) from None
    return parsed_index(text, where=f"{where}/{INDEX_NAME}")


def parsed_index(text: bytes, *, where: str) -> Index:
    """The index from the bytes of an `index.json`.

    Raises DataError if it has another format version, isn't well formed, has figures that
    contradict each other, or names a file outside its folder.
    """
    try:
        version = json.loads(text)["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{where} has format version {version!r}, and this program reads "
                f"{FORMAT_VERSION}; build the folder again"
            )
        # Strict: this program never writes a number as a string.
        index: Index = TypeAdapter(Index).validate_json(text, strict=True)
    except DataError:
        raise
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise DataError(f"{where} is damaged: {field}: {first['msg']}; build it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is damaged: {error!r}; build it again") from error
    contradiction = _contradiction(index)
    if contradiction is not None:
        raise DataError(f"{where} is damaged: {contradiction}; build it again")
    return index


def shard_files(source: str, split: str, number: int) -> tuple[str, str]:
    """The names of a shard's tar and of the table of its documents."""
    stem = f"{source}-{split}-{number:05d}"
    return f"{stem}.tar", f"{stem}.documents.npy"


def shards_of(index: Index) -> list[ShardEntry]:
    """The shards of a folder, in stored order."""
    return [
        shard
        for source in index.sources
        for split in source.splits.values()
        for shard in split.shards
    ]


def table_size(shard: ShardEntry) -> int:
    """Bytes of a shard's table of documents."""
    return TABLE_HEADER_BYTES + 24 * shard.num_documents


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _contradiction(index: Index) -> str | None:
    """A description of an inconsistency in an index; None if none is found."""
    tokenizer = index.tokenizer
    dtype = token_dtype(tokenizer.vocab_size).name
    if index.dtype != dtype:
        return f"dtype {index.dtype!r}, where {tokenizer.name} is stored as {dtype!r}"
    if tokenizer.end_of_document >= tokenizer.vocab_size:
        return f"end_of_document {tokenizer.end_of_document} is no id below {tokenizer.vocab_size}"
    if tokenizer.file not in (None, TOKENIZER_NAME):
        return f"the tokenizer's file {tokenizer.file!r}, which is outside its folder"
    names = [source.name for source in index.sources]
    if not names:
        return "it has no sources"
    if len(set(names)) < len(names):
        return f"sources {', '.join(names)}, of which one stands twice"
    if names != list(index.build.sources):
        return f"sources {', '.join(names)}, built from {', '.join(index.build.sources)}"
    for source in index.sources:
        if set(source.splits) != set(SPLITS):
            return f"{source.name} has splits {', '.join(source.splits)}"
        for split in SPLITS:
            found = _split_contradiction(index, source, split)
            if found is not None:
                return found
    return None


def _split_contradiction(index: Index, source: SourceEntry, split: str) -> str | None:
    entry = source.splits[split]
    for key in ("num_documents", "num_tokens", "num_bytes"):
        total = sum(getattr(shard, key) for shard in entry.shards)
        if getattr(entry, key) != total:
            found = getattr(entry, key)
            return f"{source.name}'s {split} split has {key} {found}, and its shards {total}"
    for number, shard in enumerate(entry.shards):
        expected = shard_files(source.name, split, number)
        for name, wanted in zip((shard.file, shard.documents), expected, strict=True):
            if name != wanted:
                return f"it names {name!r}, which is outside its folder or isn't {wanted!r}"
        stored = shard.num_tokens * np.dtype(index.dtype).itemsize
        # Each document has its end-of-document token and some text.
        if shard.num_tokens < shard.num_documents or shard.num_bytes < shard.num_documents:
            return (
                f"{shard.file} can't have {shard.num_tokens} tokens and {shard.num_bytes} bytes "
                f"of text in {shard.num_documents} documents"
            )
        if shard.size % 512 or shard.size < stored + 512 * shard.num_documents:
            return f"{shard.file} can't hold its documents in {shard.size} bytes"
    return None
