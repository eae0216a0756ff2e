"""Shards: WebDataset tars of tokenised documents, the same bytes whenever they are written.

Owns the layout of a tar, the table of its documents, and the only import of webdataset. Leaves
to `builder` which documents come, and to `reader` the way back.
"""

import io
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import ShardEntry, SplitEntry, sha256_of

_TAR_BLOCK = 512


@dataclass(kw_only=True)
class _OpenShard:
    name: str
    file: BinaryIO
    tar: Any  # webdataset has no types
    size: int = 0
    num_bytes: int = 0
    documents: list[tuple[int, int, int]]

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens, _ in self.documents)


class SplitWriter:
    """Writes the documents of one split of one source into numbered shards.

    A shard is closed before the document that would take it over `shard_tokens`; a longer
    document has a shard to itself. Use as a context manager, then ask `entry()`.
    """

    def __init__(self, folder: Path, *, prefix: str, shard_tokens: int) -> None:
        # Imported here: webdataset imports torch, and the processes that tokenise need neither.
        from webdataset.writer import TarWriter

        self._tar_writer = TarWriter
        self._folder = folder
        self._prefix = prefix
        self._shard_tokens = shard_tokens
        self._open: _OpenShard | None = None
        self._num_tokens_open = 0
        self._closed: list[ShardEntry] = []

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
            # The folder is thrown away; what went wrong first is what must be seen.
            with suppress(OSError):
                self._open.tar.close()
            with suppress(OSError):
                self._open.file.close()

    def write(self, tokens: NDArray[np.integer], *, key: str, num_bytes: int) -> None:
        """Adds a document: its tokens [num_tokens], which stand for `num_bytes` of text."""
        if self._open is not None and self._num_tokens_open + len(tokens) > self._shard_tokens:
            self._close_shard()
        shard = self._open or self._open_shard()
        member = _npy(tokens)
        shard.tar.write({"__key__": key, "npy": member})
        # One header block stands before a member; its tokens follow the .npy file's own header.
        offset = shard.size + _TAR_BLOCK + len(member) - tokens.nbytes
        shard.documents.append((offset, len(tokens), zlib.crc32(tokens.tobytes())))
        shard.size += _TAR_BLOCK + -(-len(member) // _TAR_BLOCK) * _TAR_BLOCK
        self._num_tokens_open += len(tokens)
        shard.num_bytes += num_bytes

    def entry(self) -> SplitEntry:
        """What was written, for the index."""
        assert self._open is None, "entry() is asked after the last shard is closed"
        return SplitEntry(
            num_documents=sum(shard.num_documents for shard in self._closed),
            num_tokens=sum(shard.num_tokens for shard in self._closed),
            num_bytes=sum(shard.num_bytes for shard in self._closed),
            shards=tuple(self._closed),
        )

    def _open_shard(self) -> _OpenShard:
        name = f"{self._prefix}-{len(self._closed):05d}"
        file = (self._folder / f"{name}.tar").open("wb")
        # A fixed time makes the bytes reproducible; the writer's other fields are constants.
        tar = self._tar_writer(file, mtime=0)
        self._open = _OpenShard(name=name, file=file, tar=tar, documents=[])
        self._num_tokens_open = 0
        return self._open

    def _close_shard(self) -> None:
        if self._open is None:
            return
        shard, self._open = self._open, None
        shard.tar.close()
        shard.file.close()
        tar = self._folder / f"{shard.name}.tar"
        table = self._folder / f"{shard.name}.documents.npy"
        np.save(table, np.array(shard.documents, dtype="<i8"))
        self._closed.append(
            ShardEntry(
                file=tar.name,
                size=tar.stat().st_size,
                sha256=sha256_of(tar),
                num_documents=len(shard.documents),
                num_tokens=shard.num_tokens,
                num_bytes=shard.num_bytes,
                documents=table.name,
                documents_sha256=sha256_of(table),
            )
        )


def _npy(tokens: NDArray[np.integer]) -> bytes:
    file = io.BytesIO()
    np.save(file, tokens, allow_pickle=False)
    return file.getvalue()
