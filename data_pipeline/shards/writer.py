"""Shards: WebDataset tars of documents, reproducible byte by byte.

Owns the layout of a tar, the table of its documents, and the only import of webdataset. Leaves
the choice of documents to `builder`, and reading to `reader`.
"""

import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.index import ShardEntry, SplitEntry, sha256_of, shard_files
from data_pipeline.shards.unfinished import DocumentHash, FinishedShard

_TAR_BLOCK = 512


@dataclass(kw_only=True)
class _OpenShard:
    tar_path: Path
    table_path: Path
    file: BinaryIO
    tar: Any  # webdataset has no types
    size: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    table: list[tuple[int, int, int]] = field(default_factory=list)
    hash: DocumentHash = field(default_factory=DocumentHash)


class SplitWriter:
    """Writes the documents of one split of a source into numbered shards, after the finished ones.

    A shard is closed before the document that would exceed `shard_tokens` tokens; a longer document
    gets a shard of its own. `keep` is called with each shard once its files are written. Use as a
    context manager, then call `entry()`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        source: str,
        split: str,
        shard_tokens: int,
        finished: tuple[FinishedShard, ...] = (),
        keep: Callable[[FinishedShard], None],
    ) -> None:
        # Imported here: webdataset imports torch, and the processes that tokenise don't need
        # either.
        from webdataset.writer import TarWriter

        self._tar_writer = TarWriter
        self._folder = folder
        self._source = source
        self._split = split
        self._shard_tokens = shard_tokens
        self._keep = keep
        self._open: _OpenShard | None = None
        self._closed = [shard.entry for shard in finished]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._close_shard()
        elif self._open is not None:
            # The shard is discarded; the first error is the one to report.
            with suppress(OSError):
                self._open.tar.close()
            with suppress(OSError):
                self._open.file.close()

    def write(
        self, tokens: NDArray[np.integer], *, content: bytes, number: int, digest: bytes
    ) -> None:
        """Adds a document, by its tokens [num_tokens].

        `content` is the text in UTF-8, `digest` its SHA-256, `number` its place in the source.
        """
        if self._open is not None and self._open.num_tokens + len(tokens) > self._shard_tokens:
            self._open.hash.add(number, digest)
            self._close_shard()
        shard = self._open or self._open_shard()
        payload, member = tokens.tobytes(), _npy(tokens)
        shard.tar.write({"__key__": f"{number:09d}", "npy": member})
        # A header block precedes a member; its tokens follow the .npy file's own header.
        offset = shard.size + _TAR_BLOCK + len(member) - len(payload)
        shard.table.append((offset, len(tokens), zlib.crc32(payload)))
        shard.size += _TAR_BLOCK + -(-len(member) // _TAR_BLOCK) * _TAR_BLOCK
        shard.num_tokens += len(tokens)
        shard.num_bytes += len(content)
        shard.hash.add(number, digest)

    def entry(self) -> SplitEntry:
        """The entry of what was written, for the index."""
        assert self._open is None, "entry() is asked after the last shard is closed"
        return SplitEntry(
            num_documents=sum(shard.num_documents for shard in self._closed),
            num_tokens=sum(shard.num_tokens for shard in self._closed),
            num_bytes=sum(shard.num_bytes for shard in self._closed),
            shards=tuple(self._closed),
        )

    def _open_shard(self) -> _OpenShard:
        tar_name, table_name = shard_files(self._source, self._split, len(self._closed))
        file = (self._folder / tar_name).open("wb")
        self._open = _OpenShard(
            tar_path=self._folder / tar_name,
            table_path=self._folder / table_name,
            file=file,
            # A fixed time makes the bytes reproducible; the writer's other fields are constant.
            tar=self._tar_writer(file, mtime=0),
        )
        return self._open

    def _close_shard(self) -> None:
        if self._open is None:
            return
        shard, self._open = self._open, None
        try:
            shard.tar.close()
        finally:
            shard.file.close()
        np.save(shard.table_path, np.array(shard.table, dtype="<i8"))
        entry = ShardEntry(
            file=shard.tar_path.name,
            size=shard.tar_path.stat().st_size,
            sha256=sha256_of(shard.tar_path),
            num_documents=len(shard.table),
            num_tokens=shard.num_tokens,
            num_bytes=shard.num_bytes,
            documents=shard.table_path.name,
            documents_sha256=sha256_of(shard.table_path),
        )
        self._closed.append(entry)
        self._keep(FinishedShard(entry=entry, documents_hash=shard.hash.hexdigest()))


def _npy(tokens: NDArray[np.integer]) -> bytes:
    """The same bytes as `np.save` for tokens [num_tokens], which takes several times as long."""
    fields = (
        f"{{'descr': {tokens.dtype.str!r}, 'fortran_order': False, 'shape': ({len(tokens)},), }}"
    )
    return b"\x93NUMPY\x01\x00v\x00" + f"{fields:<117}\n".encode() + tokens.tobytes()
