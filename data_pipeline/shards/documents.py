"""The tokens of a split's documents, read by mmap; each document is checked when it is first read.

Owns mapping a position in a document to bytes in a tar. Leaves which documents make a sequence to
`packing`, and where large arrays about them are to `node_arrays`.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from data_pipeline.settings import DataError, OnCorrupt
from data_pipeline.shards.index import TABLE_HEADER_BYTES, ShardEntry, table_size
from data_pipeline.shards.maps import ShardMaps
from data_pipeline.shards.node_arrays import ArrayWriter, NodeArrays
from data_pipeline.storage import ShardFiles

_ARRAYS = {"starts": "<i8", "begins": "<i8", "crcs": "<u4"}


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
        node: NodeArrays,
    ) -> None:
        self._shards = list(shards)
        self._maps = maps
        self.dtype = dtype
        self._on_corrupt = on_corrupt
        self.node = node
        # The first document of each shard, and the end, [shards + 1].
        self._firsts = np.cumsum([0, *(shard.num_documents for shard in self._shards)])
        made_of = hashlib.sha256(dtype.str.encode())
        for shard in self._shards:
            made_of.update(f"{shard.documents_sha256} {shard.size}\n".encode())
        self.made_of = made_of.hexdigest()
        """Stands for what the arrays are computed from."""
        arrays = node.arrays(
            _ARRAYS,
            length=int(self._firsts[-1]),
            made_of=self.made_of,
            write=lambda writer: _write_tables(writer, files, self._shards, dtype=dtype),
        )
        self.starts, self._begins = arrays["starts"], arrays["begins"]
        self._crcs = arrays["crcs"]
        # A bit for each document that was checked and is whole; others are rare.
        self._whole = np.zeros(-(-len(self._begins) // 8), np.uint8)
        self._corrupt: set[int] = set()
        self._lost: set[int] = set()  # shards
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
        whole = self._is_whole(documents)
        unread = documents[~(whole | self._is_corrupt(documents))]
        if not len(unread):
            return whole
        for some in self._groups(unread):
            self._check(unread[some])
        return self._is_whole(documents)

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
        self._corrupt.update(documents[~whole].tolist())
        found_whole = documents[whole]
        # Another thread may set bits of the same byte and lose one: it is checked again.
        np.bitwise_or.at(self._whole, found_whole >> 3, _bits(found_whole))

    def _is_whole(self, documents: NDArray[np.int64]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self._whole[documents >> 3] & _bits(documents)) != 0
        return found

    def _is_corrupt(self, documents: NDArray[np.int64]) -> NDArray[np.bool_]:
        found = np.zeros(len(documents), np.bool_)
        if self._lost:
            found |= np.isin(self._shard_of(documents), list(self._lost))
        if self._corrupt:
            found |= np.isin(documents, list(self._corrupt))
        return found

    def _lose(self, shard: int, why: str) -> None:
        """Counts all documents of a shard as corrupt."""
        if self._on_corrupt is OnCorrupt.fail:
            raise DataError(f"{why}; or continue without it with data.on_corrupt=skip")
        self._lost.add(shard)

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


def _bits(documents: NDArray[np.int64]) -> NDArray[np.uint8]:
    bits: NDArray[np.uint8] = np.left_shift(1, documents & 7).astype(np.uint8)
    return bits


def _write_tables(
    writer: ArrayWriter,
    files: ShardFiles,
    shards: Iterable[ShardEntry],
    *,
    dtype: np.dtype[np.unsignedinteger],
) -> None:
    """Reads the tables one by one: they are three times as large as what is made of them."""
    num_tokens = 0
    writer.append(starts=np.zeros(1, np.int64))
    for shard in shards:
        table = _table(files, shard, dtype=dtype)
        ends = num_tokens + np.cumsum(table[:, 1])
        num_tokens += shard.num_tokens
        writer.append(starts=ends, begins=table[:, 0], crcs=table[:, 2])


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
