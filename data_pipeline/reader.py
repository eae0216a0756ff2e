"""Reading a shard folder: its index checked against its files, and its tokens as one long stream.

Owns opening, verifying and the way from a place in a stream to bytes in a tar. Leaves the order
of samples to `order` and the making of batches to `batches`.
"""

import hashlib
import mmap
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import (
    Baselines,
    Index,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    read_index,
    sha256_of,
)
from data_pipeline.settings import DataError
from data_pipeline.tokenizers import token_dtype


class ShardFolder:
    """A complete folder of shards, opened by `ShardFolder.open`."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path = path
        self.index = index

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens a folder: reads its index and looks that each file is there in its full size.

        Raises DataError naming the folder or file that isn't as it should be.
        """
        folder = cls(Path(path).absolute(), read_index(Path(path)))
        for shard in folder._shards():
            _check_size(folder.path / shard.file, shard.size)
            # A .npy of format 1.0 has a header of 128 bytes, then three int64 a document.
            _check_size(folder.path / shard.documents, 128 + 24 * shard.num_documents)
        return folder

    @property
    def fingerprint(self) -> str:
        """One hash of the tokenizer and of every shard in order: what the folder's tokens are."""
        hashes = [self.tokenizer.fingerprint, *(shard.sha256 for shard in self._shards())]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    @property
    def tokenizer(self) -> TokenizerEntry:
        """Name, vocabulary size, end of document and fingerprint of what made the tokens."""
        assert self.index.tokenizer is not None  # text: see text mode
        return self.index.tokenizer

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources, in stored order."""
        return tuple(source.name for source in self.index.sources)

    @property
    def baselines(self) -> dict[str, Baselines]:
        """For each source what a byte-bigram model and zlib reach on its validation text."""
        return {source.name: source.baselines for source in self.index.sources}

    def source(self, name: str) -> SourceEntry:
        """All that the index says of a source; raises DataError where there is none of the name."""
        for source in self.index.sources:
            if source.name == name:
                return source
        raise DataError(
            f"source {name!r} is not in {self.path}; there are {', '.join(self.sources)}"
        )

    def num_tokens(self, split: str, *, source: str | None = None) -> int:
        """Tokens of a split, ends of documents included: of one source, or of all."""
        return sum(entry.num_tokens for entry in self._splits(split, source))

    def num_bytes(self, split: str, *, source: str | None = None) -> int:
        """Bytes of UTF-8 text of a split: of one source, or of all."""
        return sum(entry.num_bytes for entry in self._splits(split, source))

    def bytes_per_token(self, split: str, *, source: str | None = None) -> float:
        """Bytes of text that a token stands for; bits per byte = loss / ln 2 / this."""
        return self.num_bytes(split, source=source) / self.num_tokens(split, source=source)

    def stream(self, split: str, *, source: str | None = None) -> "TokenStream":
        """The tokens of a split: of one source, or of all in stored order."""
        shards = [shard for entry in self._splits(split, source) for shard in entry.shards]
        return TokenStream(
            self.path,
            shards,
            dtype=token_dtype(self.tokenizer.vocab_size),
            end_of_document=self.tokenizer.end_of_document,
        )

    def verify(self) -> None:
        """Reads every byte; raises DataError naming each file whose hash isn't the index's."""
        damaged = [
            name
            for shard in self._shards()
            for name, expected in (
                (shard.file, shard.sha256),
                (shard.documents, shard.documents_sha256),
            )
            if sha256_of(self.path / name) != expected
        ]
        if damaged:
            raise DataError(
                f"{self.path}: not the bytes that were written: {', '.join(damaged)}; "
                "restore them, or build the folder again"
            )

    def _splits(self, split: str, source: str | None) -> list[SplitEntry]:
        sources = self.index.sources if source is None else (self.source(source),)
        if split not in sources[0].splits:
            raise DataError(f"split {split!r} is none of {', '.join(sources[0].splits)}")
        return [entry.splits[split] for entry in sources]

    def _shards(self) -> list[ShardEntry]:
        return [
            shard
            for source in self.index.sources
            for split in source.splits.values()
            for shard in split.shards
        ]


class TokenStream:
    """The documents of a split as one long stream of `num_tokens` tokens, read by mmap.

    Before its first token stands the end of a document, so that every token has one before it.

    Raises DataError where a table of documents isn't what the index says.
    """

    def __init__(
        self,
        folder: Path,
        shards: list[ShardEntry],
        *,
        dtype: np.dtype[np.unsignedinteger],
        end_of_document: int,
    ) -> None:
        tables = [_table(folder, shard, itemsize=dtype.itemsize) for shard in shards]
        counts = np.concatenate([np.zeros(1, np.int64), *(table[:, 1] for table in tables)])
        self._starts = np.cumsum(counts)  # [num_documents + 1], in tokens of the stream
        self._firsts = np.concatenate(  # [num_documents], in tokens of the shard's file
            [np.zeros(0, np.int64), *(table[:, 0] // dtype.itemsize for table in tables)]
        )
        self._shard_of = np.repeat(np.arange(len(shards)), [len(table) for table in tables])
        self._files = [_mapped(folder / shard.file, dtype) for shard in shards]
        self._end_of_document = end_of_document
        self.num_tokens = int(self._starts[-1])

    def read(self, start: int, out: NDArray[np.int64]) -> int:
        """Fills `out` [n] with the token before `start` and those from it; returns how many.

        Fewer than n where the stream ends; what is left of `out` isn't written.
        """
        place, stop = start - 1, min(start - 1 + len(out), self.num_tokens)
        filled = 0
        if place < 0:
            out[0] = self._end_of_document
            place, filled = 0, 1
        document = int(self._starts.searchsorted(place, side="right")) - 1
        while place < stop:
            begin, end = self._starts.item(document), self._starts.item(document + 1)
            count = min(end, stop) - place
            first = self._firsts.item(document) + place - begin
            out[filled : filled + count] = self._files[self._shard_of.item(document)][
                first : first + count
            ]
            place += count
            filled += count
            document += 1
        return filled


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing (expected {expected} bytes); restore it, or build the folder again"
        ) from None
    if found != expected:
        raise DataError(
            f"{path} has {found} bytes and should have {expected}; restore it, or build the "
            "folder again"
        )


def _table(folder: Path, shard: ShardEntry, *, itemsize: int) -> NDArray[np.int64]:
    """The table of a shard's documents [num_documents, 3], checked against hash and index."""
    path = folder / shard.documents
    if sha256_of(path) != shard.documents_sha256:
        raise DataError(f"{path} is not what was written; restore it, or build the folder again")
    table: NDArray[np.int64] = np.load(path, allow_pickle=False)
    fits = (
        table.shape == (shard.num_documents, 3)
        and int(table[:, 1].sum()) == shard.num_tokens
        and bool((table[:, 1] > 0).all())
        and bool((table[:, 0] >= 0).all())
        and bool((table[:, 0] + table[:, 1] * itemsize <= shard.size).all())
        and not bool((table[:, 0] % itemsize).any())
    )
    if not fits:
        raise DataError(f"{path} disagrees with the index of its folder; build the folder again")
    return table


def _mapped(path: Path, dtype: np.dtype[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """A whole file as tokens [size / itemsize]; a tar is a multiple of 512 bytes."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)
