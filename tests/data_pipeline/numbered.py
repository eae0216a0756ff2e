"""Folders of shards whose tokens say where they are from: every token but ends is another id."""

import io
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline import OnCorrupt, ShardFolder, TokenizerEntry
from data_pipeline.shards.index import (
    FORMAT_VERSION,
    Baselines,
    BuildEntry,
    Index,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TextEntry,
    sha256_of,
    shard_files,
    write_index,
)

VOCAB_SIZE = 2**20  # so that tokens are uint32
END = VOCAB_SIZE - 1  # of a document


def write_numbered(
    to: Path, sources: Mapping[str, Sequence[int]], *, documents_per_shard: int = 10
) -> ShardFolder:
    """A folder with documents of these lengths (ends included), the same in both splits.

    The tokens of a document are consecutive numbers, then END; no number comes twice in a split.
    """
    to.mkdir()
    splits: dict[str, dict[str, SplitEntry]] = {name: {} for name in sources}
    for split in ("train", "validation"):
        first = 1
        for name, lengths in sources.items():
            documents = []
            for length in lengths:
                documents.append(np.append(np.arange(first, first + length - 1), END).astype("<u4"))
                first += length - 1
            groups = [
                documents[start : start + documents_per_shard]
                for start in range(0, len(documents), documents_per_shard)
            ]
            shards = [
                _write_shard(to, f"{name}-{split}-{number:05d}", group)
                for number, group in enumerate(groups)
            ]
            splits[name][split] = SplitEntry(
                num_documents=len(documents),
                num_tokens=sum(lengths),
                num_bytes=4 * sum(lengths),
                shards=tuple(shards),
            )
    assert first <= END
    write_index(_index(splits), to)
    return ShardFolder.open(to)


def write_many(to: Path, *, num_shards: int) -> ShardFolder:
    """A folder with so many training shards of one document of 16 tokens, all the same but in name.

    They are links to one file, so that a hundred thousand take seconds.
    """
    to.mkdir()
    document = np.append(np.arange(1, 16), END).astype("<u4")
    one = _write_shard(to, "one", [document])
    shards = []
    for number in range(num_shards):
        file, documents = shard_files("en", "train", number)
        os.symlink(one.file, to / file)
        os.symlink(one.documents, to / documents)
        shards.append(replace(one, file=file, documents=documents))
    train = SplitEntry(
        num_documents=num_shards,
        num_tokens=16 * num_shards,
        num_bytes=64 * num_shards,
        shards=tuple(shards),
    )
    validation = SplitEntry(num_documents=0, num_tokens=0, num_bytes=0, shards=())
    write_index(_index({"en": {"train": train, "validation": validation}}), to)
    return ShardFolder.open(to)


def _write_shard(to: Path, name: str, documents: Sequence[np.ndarray]) -> ShardEntry:
    path, table, size = to / f"{name}.tar", [], 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, tokens in enumerate(documents):
            file = io.BytesIO()
            np.save(file, tokens)
            member = tarfile.TarInfo(f"{number:09d}.npy")
            member.size = file.tell()
            table.append(
                (
                    size + 512 + member.size - tokens.nbytes,
                    len(tokens),
                    zlib.crc32(tokens.tobytes()),
                )
            )
            size += 512 + -(-member.size // 512) * 512
            file.seek(0)
            tar.addfile(member, file)
    np.save(to / f"{name}.documents.npy", np.array(table, "<i8"))
    num_tokens = sum(map(len, documents))
    return ShardEntry(
        file=path.name,
        size=path.stat().st_size,
        sha256=sha256_of(path),
        num_documents=len(documents),
        num_tokens=num_tokens,
        num_bytes=4 * num_tokens,
        documents=f"{name}.documents.npy",
        documents_sha256=sha256_of(to / f"{name}.documents.npy"),
    )


def _index(splits: Mapping[str, dict[str, SplitEntry]]) -> Index:
    return Index(
        format_version=FORMAT_VERSION,
        build=BuildEntry(
            sources={name: TextEntry(corpus="numbers", text_field="text") for name in splits},
            tokenizer="numbers",
            end_of_document=None,
            validation_fraction=0.5,
            shard_tokens=1,
            on_corrupt=OnCorrupt.fail,
        ),
        tokenizer=TokenizerEntry(
            name="numbers", vocab_size=VOCAB_SIZE, end_of_document=END, fingerprint=64 * "0"
        ),
        dtype="uint32",
        sources=tuple(
            SourceEntry(
                name=name,
                description="numbers",
                language=None,
                licence=None,
                num_left_out={},
                left_out_examples={},
                unknown_endings={},
                ending_examples={},
                splits=entries,
                baselines=Baselines(byte_bigram_bits_per_byte=None, zlib_bits_per_byte=None),
            )
            for name, entries in splits.items()
        ),
    )
