"""Compressed files: the content of `.gz`, `.xz`, `.bz2` and `.zst`, complete or not.

Owns the names, the only import of zstandard, which is an extra, and detecting truncated or damaged
files. Nothing is unpacked to disk.
"""

import io
import zlib
from collections.abc import Callable
from functools import partial
from posixpath import splitext
from typing import Any, BinaryIO

from data_pipeline.settings import DataError

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
_OTHER_SPELLINGS = {".gzip": ".gz", ".bzip2": ".bz2", ".zstd": ".zst"}
_TARS = {".tgz": ".gz", ".txz": ".xz", ".tbz": ".bz2", ".tbz2": ".bz2", ".tzst": ".zst"}
_GZIP = 16 + zlib.MAX_WBITS  # in zlib's interface, a stream with gzip's header and checksum
_BYTES_AT_ONCE = 2**20
_PACKED_BYTES_AT_ONCE = 2**14  # unpacked at once, and may unpack to much more


class DamagedError(Exception):
    """A file is incomplete, or isn't what its name says."""


def split_compression(name: str) -> tuple[str, str]:
    """Splits a file's name into the rest and its compression suffix: `a.tgz` → a.tar, .gz.

    The suffix is in lower case.
    """
    stem, suffix = splitext(name.lower())
    suffix = _OTHER_SPELLINGS.get(suffix, suffix)
    if suffix in _TARS:
        return f"{stem}.tar", _TARS[suffix]
    return (stem, suffix) if suffix in COMPRESSIONS else (name.lower(), "")


def uncompressed(file: io.BufferedReader, compression: str, *, where: str) -> io.BufferedReader:
    """The uncompressed content of a file; reading it raises DamagedError if the file is incomplete.

    Raises DataError if a library is missing.
    """
    if not compression:
        return file
    if not file.peek(1):
        raise DamagedError("it is empty")  # even compressed empty content isn't empty
    new_stream, error, padding = _unpackers(compression, where)
    return io.BufferedReader(_Streams(file, new_stream, error, padding), _BYTES_AT_ONCE)


def _unpackers(compression: str, where: str) -> tuple[Callable[[], Any], type[Exception], bytes]:
    """A factory of single-stream unpackers, their error, and the bytes that may follow a stream."""
    if compression == ".gz":
        return partial(zlib.decompressobj, _GZIP), zlib.error, b"\0"
    try:
        if compression == ".bz2":
            import bz2

            return bz2.BZ2Decompressor, OSError, b""
        if compression == ".xz":
            import lzma

            return lzma.LZMADecompressor, lzma.LZMAError, b"\0"
        import zstandard
    except ImportError as error:
        way_out = (
            "zstandard, which is not installed: pip install 'moetrain[corpora]'"
            if compression == ".zst"
            else f"a module that this Python was built without ({error}); unpack it, or pack "
            "it as .gz"
        )
        raise DataError(f"{where} is read with {way_out}") from error
    # Large corpora are compressed with `zstd --long=31`, which needs a window of this size.
    unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
    return unpacker.decompressobj, zstandard.ZstdError, b""


class _Streams(io.RawIOBase):
    """The uncompressed content of concatenated compressed streams.

    The libraries' own readers accept a truncated stream as complete (zstandard), ignore what
    follows the first one (bz2, lzma), or lose the content before a damaged place (gzip).
    """

    def __init__(
        self,
        file: BinaryIO,
        new_stream: Callable[[], Any],
        error: type[Exception],
        padding: bytes,
    ) -> None:
        self._file = file
        self._new_stream = new_stream
        self._error = error
        self._padding = padding
        self._stream = new_stream()
        self._in_stream = False
        self._packed = b""
        self._unpacked = memoryview(b"")
        self._failed: DamagedError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills the whole buffer unless the file ends: peeking shows as much as it can."""
        if self._failed is not None:
            raise self._failed
        filled = 0
        try:
            while filled < len(buffer) and (self._unpacked or self._read_on()):
                size = min(len(buffer) - filled, len(self._unpacked))
                buffer[filled : filled + size] = self._unpacked[:size]
                self._unpacked = self._unpacked[size:]
                filled += size
        except DamagedError as error:
            if not filled:
                raise
            self._failed = error  # the content before it is returned first
        return filled

    def _read_on(self) -> bool:
        """Reads the next piece, which may unpack to nothing; False at the end of the file."""
        self._packed = self._packed or self._file.read(_PACKED_BYTES_AT_ONCE)
        if not self._packed:
            if self._in_stream:
                raise DamagedError("it ends inside a packed stream")
            return False
        if not self._in_stream and self._padding:
            self._packed = self._packed.lstrip(self._padding)
        if self._packed:
            self._unpack()
        return True

    def _unpack(self) -> None:
        try:
            self._unpacked = memoryview(self._stream.decompress(self._packed))
        except self._error as error:
            raise DamagedError(str(error)) from error
        self._packed, self._in_stream = self._stream.unused_data, not self._stream.eof
        if self._stream.eof:
            self._stream = self._new_stream()
