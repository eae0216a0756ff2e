"""Text files: the documents in one file, by the format that its name says.

Owns the formats, compression, and what a damaged file looks like: one reader for each format.
Leaves HTML to `html_text`, tables to `arrow_tables`, and which files belong to a corpus, and what
becomes of damaged ones, to `corpora`. Nothing is unpickled, and nothing is unpacked to disk.
"""

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from posixpath import splitext
from typing import BinaryIO

from data_pipeline.arrow_tables import table_texts
from data_pipeline.html_text import html_text
from data_pipeline.raw_documents import RawDocument, Reason, Text, Unread
from data_pipeline.settings import DataError

_Reader = Callable[[BinaryIO, str], Iterator[RawDocument]]

_COMPRESSIONS = (".gz", ".zst")
_TABLES = (".parquet", ".arrow")
# In a tar these are documents, as in a folder; of any other kind it may hold what it likes, ...
_TEXT_MEMBERS = frozenset({".txt", ".text", ".md", ".markdown"})
# ... but these, which other readers of WebDataset would unpickle: a tar that has them isn't text.
_PICKLES = frozenset({".pkl", ".pickle", ".pyd", ".pth", ".pt"})
_BYTES_AT_ONCE = 2**20
_ZST_BYTES_AT_ONCE = 2**14  # unpacked in one piece, and it may unpack to much more
_TAR_BLOCK = 512


def read_documents(path: Path, *, where: str) -> Iterator[RawDocument]:
    """The documents of a file that is called `where`, in its order, and what of it isn't read.

    The name decides how it is read, `.gz` and `.zst` in place of compression: `.jsonl` and
    `.ndjson` hold a document a line, `.parquet` and `.arrow` one a row, `.tar` one a text member,
    `.html`, `.htm` and `.xhtml` are one without its markup, and anything else is one as it is.

    Raises DataError where a library is missing, which is no fault of the file.
    """
    format_suffix, compression = _suffixes(path.name)
    if format_suffix in _TABLES:
        if compression:
            yield _corrupt(where, f"can't be read compressed: unpack it to a {format_suffix} file")
        else:
            yield from table_texts(path, where=where)
        return
    reader = _READERS.get(format_suffix, _plain)
    with path.open("rb") as file:
        try:
            yield from reader(_uncompressed(file, compression, path), where)
        except _DAMAGE as error:
            yield _corrupt(where, f"is damaged or not whole: {error}")


def text_size(name: str, size: int) -> int:
    """About how many bytes of text a file holds, from its name and its size on disk."""
    format_suffix, compression = _suffixes(name)
    share = 0.2 if _READERS.get(format_suffix) is _html else 1.0
    # Markup is most of a page; text packs to a third or a quarter.
    packed = compression or format_suffix == ".parquet"
    return round(size * share * (4 if packed else 1))


class _DamagedError(Exception):
    pass


_DAMAGE = (_DamagedError, EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)


def _suffixes(name: str) -> tuple[str, str]:
    """The suffixes that name a file's format and its compression: .jsonl, .gz."""
    stem, suffix = splitext(name.lower())
    if suffix == ".tgz":
        return ".tar", ".gz"
    if suffix in _COMPRESSIONS:
        return splitext(stem)[1], suffix
    return suffix, ""


def _uncompressed(file: BinaryIO, compression: str, path: Path) -> BinaryIO:
    if not compression:
        return file
    if not file.read(1):
        raise _DamagedError("it is empty")  # gzip takes nothing for the packed form of nothing
    file.seek(0)
    if compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BYTES_AT_ONCE)
    return io.BufferedReader(_ZstdFrames(file, path), _BYTES_AT_ONCE)


class _ZstdFrames(io.RawIOBase):
    """What Zstandard frames unpack to. zstandard's own reader takes a cut frame for a whole one."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{path} is read with zstandard, which is not installed: "
                "pip install 'moetrain[corpora]'"
            ) from error
        self._file = file
        self._error = zstandard.ZstdError
        # Large corpora are packed with `zstd --long=31`, which needs a window of this size.
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._unpacker.decompressobj()
        self._in_frame = False
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_ZST_BYTES_AT_ONCE)
            if not self._packed:
                if self._in_frame:
                    raise _DamagedError("it ends inside a Zstandard frame")
                return 0
            try:
                self._unpacked = memoryview(self._frame.decompress(self._packed))
            except self._error as error:
                raise _DamagedError(str(error)) from error
            self._packed, self._in_frame = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._unpacker.decompressobj()
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size


def _corrupt(where: str, why: str) -> Unread:
    return Unread(where, Reason.corrupt, why)


def _plain(file: BinaryIO, where: str) -> Iterator[RawDocument]:
    try:
        yield Text(where, file.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        yield Unread(where, Reason.not_utf8, f"is not UTF-8: {error}")


def _html(file: BinaryIO, where: str) -> Iterator[RawDocument]:
    try:
        yield Text(where, html_text(file.read()))
    except UnicodeDecodeError as error:
        yield Unread(where, Reason.not_utf8, f"is not UTF-8: {error}")


def _json_lines(file: BinaryIO, where: str) -> Iterator[RawDocument]:
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            place = f"{where}, line {number}"
            document = _json_document(line, place)
            yield document or _corrupt(place, "has no 'text' field that holds a string")


def _json_member(file: BinaryIO, where: str) -> Iterator[RawDocument]:
    # One without text says something else of its sample, such as an image's size.
    document = _json_document(file.read(), where)
    if document is not None:
        yield document


def _json_document(content: bytes, where: str) -> RawDocument | None:
    """The `text` of a JSON object, None where there is none."""
    try:
        record = json.loads(content)
    except UnicodeDecodeError as error:
        return Unread(where, Reason.not_utf8, f"is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return _corrupt(where, f"is not JSON: {error}")
    text = record.get("text") if isinstance(record, dict) else None
    return Text(where, text) if isinstance(text, str) else None


def _tar(file: BinaryIO, where: str) -> Iterator[RawDocument]:
    blocks = _TarBlocks(file)
    with tarfile.open(fileobj=blocks, mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members.clear()  # else it would keep them all
            yield from _member_documents(tar, member, f"{where}, member {member.name!r}")
    # tarfile takes a damaged header, or nothing at all, for the end that two empty blocks mark.
    if blocks.last_read != bytes(_TAR_BLOCK):
        raise _DamagedError(f"no member and no end of the tar at byte {tar.offset}")
    while more := blocks.read(_BYTES_AT_ONCE):
        if more.strip(b"\0"):
            raise _DamagedError(f"something follows the end of the tar at byte {tar.offset}")


def _member_documents(
    tar: tarfile.TarFile, member: tarfile.TarInfo, where: str
) -> Iterator[RawDocument]:
    suffix, compression = _suffixes(member.name)
    if member.name.startswith("/") or ".." in member.name.split("/"):
        yield _corrupt(where, "is refused: its name leads out of the tar")
    elif member.isdir():
        return
    elif not member.isreg() or member.issparse():
        yield _corrupt(where, "is refused: it is a link, a device or a sparse file")
    elif suffix in _PICKLES:
        yield _corrupt(where, "is refused: a pickle can run code; give the text as .txt or .json")
    elif not compression and (reader := _MEMBER_READERS.get(suffix)) is not None:
        content = tar.extractfile(member)
        assert content is not None, "a regular member has content"
        yield from reader(io.BytesIO(content.read()), where)


class _TarBlocks:
    """A file that tarfile can read: seeks forward by reading, and knows what was last read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self.last_read = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise _DamagedError(f"a member's size leads back from byte {self._position}")
        while self._position < position:
            skipped = len(self._file.read(min(_BYTES_AT_ONCE, position - self._position)))
            if not skipped:
                break  # tarfile reads a byte after each seek, and finds the end
            self._position += skipped

    def read(self, size: int) -> bytes:
        # In pieces: a header that lies about a size must not have that much memory set aside.
        pieces = []
        while size > 0 and (piece := self._file.read(min(_BYTES_AT_ONCE, size))):
            pieces.append(piece)
            size -= len(piece)
        self.last_read = b"".join(pieces)
        self._position += len(self.last_read)
        return self.last_read


_READERS: dict[str, _Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".tar": _tar,
}
_MEMBER_READERS: dict[str, _Reader] = {
    **{suffix: _plain for suffix in _TEXT_MEMBERS},
    **{suffix: reader for suffix, reader in _READERS.items() if reader is not _tar},
    ".json": _json_member,
}
