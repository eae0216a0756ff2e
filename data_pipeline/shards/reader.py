"""Reading a shard folder: its index checked against its files, and the tokens of its documents.

Owns opening, verifying, and mapping a position in a document to bytes in a tar; each document is
checked when it is first read. Leaves which documents make a sequence to `packing`, the order of
sequences to `order` and assembling batches to `batches`.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.settings import CacheSettings, DataError, OnCorrupt
from data_pipeline.shards.index import (
    TABLE_HEADER_BYTES,
    Baselines,
    Index,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    read_index,
    shards_of,
    table_size,
)
from data_pipeline.shards.maps import ShardMaps, num_mappable
from data_pipeline.storage import ShardFiles, open_files
from data_pipeline.tokenizers.named import tokenizer_from
from data_pipeline.tokenizers.tokenizer import Tokenizer, TokenizerEntry, token_dtype

# How many shards one call to read holds open at a time, if the process may have many open.
_SHARDS_AT_ONCE = 256


class ShardFolder:
    """A complete folder of shards, opened by `ShardFolder.open`.

    `damaged` says, for each shard that was found missing or truncated, what is wrong with it.
    """

    def __init__(self, index: Index, files: ShardFiles, *, damaged: Mapping[str, str]) -> None:
        self.index = index
        self.damaged = damaged
        self._files = files
        self._num_shards = len(shards_of(index))
        self._num_mappable = num_mappable(self._num_shards)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        on_corrupt: OnCorrupt = OnCorrupt.fail,
        cache: CacheSettings | None = None,
    ) -> Self:
        """Opens a local folder or a URL: reads its index and checks that each file exists.

        Local files must have their full size; remote files are checked when they are downloaded.

        Raises DataError naming the folder or file that is wrong. If damaged shards are to be
        skipped, they are recorded in `damaged` instead.
        """
        files, damaged = open_files(str(path), cache=cache or CacheSettings()), dict[str, str]()
        index = read_index(files)
        folder = cls(index, files, damaged=damaged)
        for shard in shards_of(index):
            files.check(shard.documents, size=table_size(shard))
            try:
                files.check(shard.file, size=shard.size)
            except DataError as error:
                if on_corrupt is OnCorrupt.fail:
                    raise
                damaged[shard.file] = str(error)
        return folder

    @property
    def location(self) -> str:
        """The folder's absolute path or its URL, without secrets, for people."""
        return self._files.location

    @property
    def path(self) -> Path:
        """The path of the folder, if it is on a disk of this machine."""
        return Path(self.location)

    @property
    def fingerprint(self) -> str:
        """One hash of the tokenizer and of every shard in order; identifies the folder's tokens."""
        hashes = [self.tokenizer.fingerprint, *(shard.sha256 for shard in shards_of(self.index))]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    @property
    def tokenizer(self) -> TokenizerEntry:
        """Name, vocabulary size, end of document and fingerprint of the tokens' tokenizer."""
        return self.index.tokenizer

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer itself, from the folder's own copy if it has one.

        Raises DataError if it isn't the one that made the tokens.
        """
        entry = self.tokenizer
        definition = None if entry.file is None else self._files.read_bytes(entry.file)
        return tokenizer_from(entry, definition=definition)

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources, in stored order."""
        return tuple(source.name for source in self.index.sources)

    @property
    def baselines(self) -> dict[str, Baselines]:
        """For each source, what a byte-bigram model and zlib reach on its validation text."""
        return {source.name: source.baselines for source in self.index.sources}

    def source(self, name: str) -> SourceEntry:
        """The index's entry of a source; raises DataError if there is no source of that name."""
        for source in self.index.sources:
            if source.name == name:
                return source
        raise DataError(
            f"source {name!r} is not in {self.location}; there are {', '.join(self.sources)}"
        )

    def num_tokens(self, split: str, *, source: str | None = None) -> int:
        """Tokens of a split, ends of documents included, of one source or of all."""
        return sum(entry.num_tokens for entry in self._splits(split, source))

    def num_bytes(self, split: str, *, source: str | None = None) -> int:
        """Bytes of UTF-8 text of a split, of one source or of all."""
        return sum(entry.num_bytes for entry in self._splits(split, source))

    def documents(
        self, split: str, *, source: str, on_corrupt: OnCorrupt = OnCorrupt.fail
    ) -> "Documents":
        """The documents of a split of a source."""
        (entry,) = self._splits(split, source)
        # The shards of all sources and splits may be open together.
        share = self._num_mappable * len(entry.shards) // max(1, self._num_shards)
        maps = ShardMaps(
            self._files,
            most=self._files.max_mapped or max(1, share),
            at_once=min(_SHARDS_AT_ONCE, max(1, self._num_mappable // 4)),
        )
        return Documents(
            entry.shards,
            files=self._files,
            maps=maps,
            dtype=token_dtype(self.tokenizer.vocab_size),
            on_corrupt=on_corrupt,
            damaged=self.damaged,
        )

    def _splits(self, split: str, source: str | None) -> list[SplitEntry]:
        sources = self.index.sources if source is None else (self.source(source),)
        if split not in sources[0].splits:
            raise DataError(f"split {split!r} is none of {', '.join(sources[0].splits)}")
        return [entry.splits[split] for entry in sources]


# Whether a document was checked, and with which result.
_UNREAD, _WHOLE, _CORRUPT = 0, 1, 2


class Documents:
    """The documents of one split of a source, read by mmap; shards are opened at first use.

    `starts` [documents + 1] says where each would begin, in tokens, if all were joined.
    Thread-safe.

    Raises DataError if a table of documents isn't what the index says.
    """

    def __init__(
        self,
        shards: Iterable[ShardEntry],
        *,
        files: ShardFiles,
        maps: ShardMaps,
        dtype: np.dtype[np.unsignedinteger],
        on_corrupt: OnCorrupt,
        damaged: Mapping[str, str],
    ) -> None:
        self._shards = list(shards)
        self._maps = maps
        self.dtype = dtype
        self._on_corrupt = on_corrupt
        tables = [_table(files, shard, dtype=dtype) for shard in self._shards]
        table = np.concatenate([np.zeros((0, 3), np.int64), *tables])
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(table[:, 1])])
        self._begins = table[:, 0].copy()  # [documents], in bytes of the shard's file
        self._crcs = table[:, 2].astype(np.uint32)
        # The first document of each shard, and the end, [shards + 1].
        self._firsts = np.cumsum([0, *map(len, tables)])
        self._known = np.full(len(table), _UNREAD, np.uint8)
        for number, shard in enumerate(self._shards):
            if shard.file in damaged:
                self._lose(number, damaged[shard.file])

    @property
    def num_documents(self) -> int:
        """How many there are."""
        return len(self._begins)

    @property
    def num_shards(self) -> int:
        """How many shards they are in."""
        return len(self._shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, ends of documents included."""
        return int(self.starts[-1])

    def tokens(self, document: int) -> NDArray[np.unsignedinteger]:
        """A document's tokens [num_tokens], the end of the document included.

        Raises DataError if they aren't what was written.
        """
        shard = int(self._shard_of(np.array(document)))
        begin, end = self._extent(document)
        found = self._maps.bytes_of(self._shards[shard])[begin:end]
        if zlib.crc32(found) != self._crcs[document]:
            raise DataError(self._complaint(document, shard))
        return np.frombuffer(found, self.dtype)

    def whole(self, documents: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the documents [n] are what was written, by their CRC-32, checked at first use.

        Raises DataError for one that isn't, unless such documents are skipped.
        """
        unread = documents[self._known[documents] == _UNREAD]
        for some in self._groups(unread):
            self._check(unread[some])
        whole: NDArray[np.bool_] = self._known[documents] == _WHOLE
        return whole

    def read(
        self,
        documents: NDArray[np.int64],
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        out: NDArray[np.unsignedinteger],
        places: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Copies pieces [n] of intact documents to `places` of the one-dimensional `out`.

        Returns the token before each piece [n], which is meaningless if the offset is 0.
        """
        before = np.zeros(len(documents), np.int64)
        for some in self._groups(documents):
            before[some] = self._read(
                documents[some], offsets[some], lengths[some], out=out, places=places[some]
            )
        return before

    def _read(
        self,
        documents: NDArray[np.int64],
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        out: NDArray[np.unsignedinteger],
        places: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        shards = self._shard_of(documents).tolist()
        maps = {shard: self._maps.bytes_of(self._shards[shard]) for shard in set(shards)}
        size = self.dtype.itemsize
        begins = self._begins[documents] + offsets * size
        ends, firsts, lasts = begins + lengths * size, places * size, (places + lengths) * size
        raw = out.view(np.uint8).data
        for shard, begin, end, first, last in zip(
            shards, begins.tolist(), ends.tolist(), firsts.tolist(), lasts.tolist(), strict=True
        ):
            raw[first:last] = maps[shard][begin:end]
        before = np.zeros(len(documents), np.int64)
        for piece in np.flatnonzero(offsets).tolist():
            begin = begins.item(piece)
            before[piece] = int.from_bytes(maps[shards[piece]][begin - size : begin], "little")
        return before

    def _check(self, documents: NDArray[np.int64]) -> None:
        """Checks which documents [n] are what was written."""
        shards = self._shard_of(documents)
        maps: dict[int, memoryview] = {}
        for shard in set(shards.tolist()):
            try:
                maps[shard] = self._maps.bytes_of(self._shards[shard])
            except DataError as error:
                self._lose(shard, str(error))
                documents, shards = documents[shards != shard], shards[shards != shard]
        begins = self._begins[documents]
        ends = begins + (self.starts[documents + 1] - self.starts[documents]) * self.dtype.itemsize
        places = zip(shards.tolist(), begins.tolist(), ends.tolist(), strict=True)
        found = [zlib.crc32(maps[shard][begin:end]) for shard, begin, end in places]
        whole = self._crcs[documents] == found
        if self._on_corrupt is OnCorrupt.fail and not whole.all():
            first = int(whole.argmin())
            raise DataError(self._complaint(documents.item(first), shards.item(first)))
        self._known[documents] = np.where(whole, _WHOLE, _CORRUPT)

    def _lose(self, shard: int, why: str) -> None:
        """Counts all documents of a shard as corrupt."""
        if self._on_corrupt is OnCorrupt.fail:
            raise DataError(f"{why}; or continue without it with data.on_corrupt=skip")
        self._known[self._firsts[shard] : self._firsts[shard + 1]] = _CORRUPT

    def _complaint(self, document: int, shard: int) -> str:
        begin, end = self._extent(document)
        return (
            f"{self._shards[shard].file}: its document {document - self._firsts[shard]} (bytes "
            f"{begin} to {end}) isn't what was written; restore the shard, build the folder "
            "again, or continue without such documents with data.on_corrupt=skip"
        )

    def _shard_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._firsts.searchsorted(documents, side="right") - 1

    def _extent(self, document: int) -> tuple[int, int]:
        """Where a document's tokens are in its shard's file, in bytes."""
        begin = self._begins.item(document)
        num_tokens = self.starts.item(document + 1) - self.starts.item(document)
        return begin, begin + num_tokens * self.dtype.itemsize

    def _groups(self, documents: NDArray[np.int64]) -> Iterator[slice | NDArray[np.intp]]:
        """Parts of the documents [n], each in few enough shards that all of them may be open."""
        if not len(documents):
            return
        shards = self._shard_of(documents)
        different, which = np.unique(shards, return_inverse=True)
        at_once = self._maps.at_once
        if len(different) <= at_once:
            yield slice(None)
            return
        for group in range(-(-len(different) // at_once)):
            yield np.flatnonzero(which // at_once == group)


def _table(
    files: ShardFiles, shard: ShardEntry, *, dtype: np.dtype[np.unsignedinteger]
) -> NDArray[np.int64]:
    """The table of a shard's documents [num_documents, 3], checked against hash and index."""
    name, size, sha256 = shard.documents, table_size(shard), shard.documents_sha256
    with files.open(name, size=size, sha256=sha256) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{name} is not what was written; restore it, or build the folder again")
    # Not np.load, most of whose time goes to the header: a folder may have 100,000 tables.
    table = np.frombuffer(content, "<i8", offset=TABLE_HEADER_BYTES).reshape(-1, 3)
    fits = (
        int(table[:, 1].sum()) == shard.num_tokens
        and bool((table[:, 1] > 0).all())
        and bool((table[:, 0] >= 0).all())
        and bool((table[:, 0] + table[:, 1] * dtype.itemsize <= shard.size).all())
        and bool(((table[:, 2] >= 0) & (table[:, 2] < 2**32)).all())
    )
    if not fits:
        raise DataError(f"{name} disagrees with the index of its folder; build the folder again")
    return table
