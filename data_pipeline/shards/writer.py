"""Shards: WebDataset tars of documents, reproducible byte by byte.

Owns the layout of a tar and the table of its documents. Leaves the choice of documents to
`builder`, and reading to `reader`.

A tar's bytes are those of webdataset's TarWriter. They are laid out here because tarfile, which it
uses, takes 30 µs for the header of a member, most of the time of building short documents.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.index import ShardEntry, SplitEntry, sha256_of, shard_files
from data_pipeline.shards.unfinished import DocumentHash, FinishedShard

_TAR_BLOCK = 512
_TAR_RECORD = 10240  # a tar's size is a multiple of it
_MOST_TAR_BYTES = 8**11  # of a member: its size has eleven octal digits
_COPIED_BYTES = 2**20  # a longer member is written in pieces, and not copied


def _tar_header() -> bytes:
    """The header of a member without name and size, as webdataset's TarWriter makes it."""
    member = tarfile.TarInfo()
    member.mode, member.uname, member.gname = 0o444, "bigdata", "bigdata"
    return member.tobuf(tarfile.USTAR_FORMAT)


# Name, size and checksum differ between members; the fields between are constant.
_HEADER = _tar_header()
_AFTER_NAME, _AFTER_SIZE, _AFTER_CHECKSUM = _HEADER[100:124], _HEADER[136:148], _HEADER[155:]
# Of the constant fields, and of the checksum's own field as spaces.
_CONSTANT_SUM = sum(_AFTER_NAME) + sum(_AFTER_SIZE) + sum(_AFTER_CHECKSUM) + 7 * ord(" ")


@dataclass(kw_only=True)
class _OpenShard:
    tar_path: Path
    table_path: Path
    file: BinaryIO
    size: int = 0
    sha256: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    num_tokens: int = 0
    num_bytes: int = 0
    table: list[tuple[int, int, int]] = field(default_factory=list)
    hash: DocumentHash = field(default_factory=DocumentHash)

    def write(self, *parts: bytes | memoryview) -> None:
        size = sum(map(len, parts))
        for part in parts if size > _COPIED_BYTES else (b"".join(parts),):
            self.file.write(part)
            self.sha256.update(part)
        self.size += size


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
        payload = np.ascontiguousarray(tokens).data.cast("B")
        npy = _npy_header(tokens)
        size = len(npy) + len(payload)
        header = _member_header(b"%09d.npy" % number, size)
        # A header block precedes a member; its tokens follow the .npy file's own header.
        offset = shard.size + _TAR_BLOCK + len(npy)
        shard.table.append((offset, len(tokens), zlib.crc32(payload)))
        shard.write(header, npy, payload, bytes(-size % _TAR_BLOCK))
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
        )
        return self._open

    def _close_shard(self) -> None:
        if self._open is None:
            return
        shard, self._open = self._open, None
        try:
            # Two empty blocks end a tar.
            shard.write(bytes(2 * _TAR_BLOCK + -(shard.size + 2 * _TAR_BLOCK) % _TAR_RECORD))
        finally:
            shard.file.close()
        np.save(shard.table_path, np.array(shard.table, dtype="<i8"))
        entry = ShardEntry(
            file=shard.tar_path.name,
            size=shard.size,
            sha256=shard.sha256.hexdigest(),
            num_documents=len(shard.table),
            num_tokens=shard.num_tokens,
            num_bytes=shard.num_bytes,
            documents=shard.table_path.name,
            documents_sha256=sha256_of(shard.table_path),
        )
        self._closed.append(entry)
        self._keep(FinishedShard(entry=entry, documents_hash=shard.hash.hexdigest()))


def _member_header(name: bytes, size: int) -> bytes:
    """The tar header of a file with this name and size."""
    assert len(name) <= 100, name
    assert size < _MOST_TAR_BYTES, f"{name!r} of {size} bytes"
    digits = b"%011o" % size
    checksum = b"%06o\0" % (_CONSTANT_SUM + sum(name) + sum(digits))
    return b"".join(
        (name.ljust(100, b"\0"), _AFTER_NAME, digits, b"\0", _AFTER_SIZE, checksum, _AFTER_CHECKSUM)
    )


def _npy_header(tokens: NDArray[np.integer]) -> bytes:
    """What `np.save` writes before tokens [num_tokens], which takes it several times as long."""
    fields = (
        f"{{'descr': {tokens.dtype.str!r}, 'fortran_order': False, 'shape': ({len(tokens)},), }}"
    )
    return b"\x93NUMPY\x01\x00v\x00" + f"{fields:<117}\n".encode()
