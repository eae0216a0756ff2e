"""Text files: the documents in one file, by its name and its content.

Owns the formats by file extension, and tar files: the same rules hold for the files of a folder and
the members of a tar. Leaves JSON to `json_documents`, HTML to `html_text`, tables to
`arrow_tables`, compression to `compression`. Leaves which files belong to a corpus, and the
handling of damaged ones, to `corpora`. Nothing is unpickled, and nothing is unpacked to disk.
"""

import codecs
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from data_pipeline.corpora.arrow_tables import table_texts
from data_pipeline.corpora.compression import DamagedError, split_compression, uncompressed
from data_pipeline.corpora.html_text import html_text
from data_pipeline.corpora.json_documents import (
    is_array,
    json_by_content,
    json_lines,
    json_lines_between,
    json_values,
)
from data_pipeline.corpora.raw_documents import RawDocument, Reason, Text, Unread

_Reader = Callable[[BufferedReader, str, str], Iterator[RawDocument]]

_TABLES = (".parquet", ".arrow", ".feather")
_PLAIN_ENDINGS = """
.txt .text .md .markdown .mdx .rst .adoc .org .tex .log .srt .vtt .wiki
.py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hh .hpp .hxx .cu .cuh .m .mm .cs .fs .vb .java .kt .kts
.scala .groovy .clj .go .rs .swift .dart .zig .nim .d .js .mjs .cjs .jsx .ts .tsx .vue .svelte .css
.scss .sass .less .php .rb .pl .pm .lua .r .jl .hs .ml .mli .elm .ex .exs .erl .hrl .lisp .el .scm
.rkt .f .f90 .f95 .f03 .for .pas .ada .adb .ads .cob .asm .s .v .sv .vhd .vhdl .sql .sh .bash .zsh
.fish .ps1 .bat .cmd .awk .sed .tcl .cmake .make .mk .gradle .bazel .bzl .nix .tf .proto .graphql
.thrift .yaml .yml .toml .ini .cfg .conf .xml .svg .diff .patch .po .pot
"""
_PLAIN = frozenset(_PLAIN_ENDINGS.split())
# Extensions of formats that may hold text but can't be read.
_OTHER_TABLES = ".csv .tsv .xlsx .xls .ods .orc .avro .sqlite .sqlite3 .warc .wet .h5 .hdf5"
_OTHER_PACKINGS = ".whl .jar .npz .zip .7z .rar .lz4 .lz .lzma .lzo .z .br .sz .snappy"
_PICKLES = ".pkl .pickle .pyd .pth"
_NOT_READ = "is of a kind that isn't read"
_PICKLE = ("is refused: a pickle can run code", "give the text as .txt or .jsonl")
_TABLE = (
    _NOT_READ,
    "convert it to .parquet or .jsonl, or name it .txt to have it read as it is",
)
_PACKING = (_NOT_READ, "unpack it, or pack it as .gz, .xz, .bz2, .zst or .tar")
_REFUSED = {
    **dict.fromkeys(_OTHER_TABLES.split(), _TABLE),
    **dict.fromkeys(_OTHER_PACKINGS.split(), _PACKING),
    **dict.fromkeys(_PICKLES.split(), _PICKLE),
}
# How the content of such files begins, whatever their names; and that of formats that are read
# only by their names.
_NOT_READ_BY_CONTENT = {
    b"PK\3\4": _PACKING,
    b"7z\xbc\xaf\x27\x1c": _PACKING,
    b"Rar!\x1a\7": _PACKING,
    b"\4\x22\x4d\x18": _PACKING,  # lz4
    b"SQLite format 3\0": _TABLE,
    b"\x89HDF\r\n\x1a\n": _TABLE,
    b"\x1f\x8b": ("is packed", "name it .gz"),
    b"\xfd7zXZ\0": ("is packed", "name it .xz"),
    b"\x28\xb5\x2f\xfd": ("is packed", "name it .zst"),
    b"PAR1": ("is a table", "name it .parquet"),
    b"ARROW1\0\0": ("is a table", "name it .arrow"),
}
_TORCH = ".pt"  # a pickle, or text in Portuguese
_NUMBERED = re.compile(r"(.+?)(?:(?:\.\d+)+| ?\(\d+\)| copy(?: \d+)?)")
_NUMBER = re.compile(rb"\s*-?\d{1,20}\s*")  # as in a WebDataset's .cls and .index
ALLOW = "give yourself the right to read it"
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
# What replaces a file of git-annex: its pointer, or a link of it stored as text.
_GIT_ANNEX = re.compile(rb"(?:(?:\.\./)*\.git)?/annex/objects/\S*--\S+\s")
_DVC = re.compile(rb"^outs:\s", re.MULTILINE)
_HEAD_BYTES = 2**13
_BYTES_AT_ONCE = 2**20
_TAR_BLOCK = 512


def read_documents(path: Path, *, where: str, field: str) -> Iterator[RawDocument]:
    """The documents of a file, called `where` in messages, in order, and what of it isn't read.

    The suffix decides the format; `.gz`, `.xz`, `.bz2` or `.zst` in addition the compression.
    `.jsonl` and `.ndjson` hold a document per line. `.json` holds the same or one array or object,
    by its content. `.parquet` and `.arrow` hold one per row. A `.tar` holds what its members would
    hold as files. `.html`, `.htm` and `.xhtml` are one document without its markup. Any other text
    file is one document as it is, unless it has JSON in it and an unknown suffix or none. `field`
    names the text in JSON and tables.

    Raises DataError if a library is missing, which isn't the file's fault.
    """
    try:
        file = path.open("rb")
    except PermissionError as error:
        yield Unread(where, Reason.unreadable, f"can't be read: {error.strerror}", ALLOW)
        return
    with file:
        yield from _documents(file, path.name, where, field, path=path)


def read_lines(
    path: Path, *, where: str, field: str, begin: int, end: int, num_before: int
) -> Iterator[RawDocument]:
    """The documents of a file of lines (`has_lines`) that begin at `begin` ≤ byte < `end`.

    `num_before` lines come before them in the file.
    """
    with path.open("rb") as file:
        yield from json_lines_between(
            file, where, field, begin=begin, end=end, num_before=num_before
        )


def has_lines(path: Path) -> bool:
    """Whether each line of a file is a document, so that it can be read from any of them."""
    ending, compression = _ending(path.name)
    if compression or _READERS.get(ending) is not json_lines:
        return False
    try:
        with path.open("rb") as file:
            return not is_array(file)
    except OSError:
        return False  # reading it says why


def is_one_document(name: str) -> bool:
    """Whether a file of this name is one document, as it is."""
    ending, compression = _ending(name)
    return ending in _PLAIN and not compression


def refused(name: str, *, where: str) -> Unread | None:
    """For a file that can't be read, by its name alone, says why; None for any other."""
    ending, compression = _ending(name)
    if ending in _TABLES and compression:
        way_out = f"unpack it to a {ending} file"
        return Unread(where, Reason.corrupt, "is a table, which can't be read compressed", way_out)
    if ending in _REFUSED:
        return Unread(where, Reason.corrupt, *_REFUSED[ending])
    return None


def text_size(name: str, size: int) -> int:
    """Roughly how many bytes of text a file holds, from its name and its size on disk."""
    ending, compression = _ending(name)
    share = 0.2 if _READERS.get(ending) is _html else 1.0
    # Markup is most of a page; text compresses to a third or a quarter.
    packed = compression or ending == ".parquet"
    return round(size * share * (4 if packed else 1))


def is_hidden(name: str) -> bool:
    """Whether a name, without its folders, is hidden and skipped: `.git`, `._a.txt`."""
    return name.startswith(".") and name not in (".", "..")


def _ending(name: str) -> tuple[str, str]:
    """The suffixes that name a file's format and its compression: .jsonl, .gz; '' for none.

    Numbers (`part.001`) and anything with a space aren't suffixes. If numbers of pieces or copies
    follow (`a.jsonl.00`, `a.json copy 2`), the known suffix before them counts.
    """
    rest, compression = split_compression(name.rpartition("/")[2])
    found = re.search(r".(\.(?!\d+$)[^\s.]{1,12})$", rest)
    if found is None and (numbered := _NUMBERED.fullmatch(rest)) and not compression:
        kind = _ending(numbered[1])
        if kind[1] or kind[0] in _READERS or kind[0] in _TABLES or kind[0] in _REFUSED:
            return kind
    return (found[1] if found else ""), compression


def _documents(
    file: BufferedReader, name: str, where: str, field: str, *, path: Path | None = None
) -> Iterator[RawDocument]:
    """The documents of a file, which has a path, or of a tar member, with this name."""
    unread = refused(name, where=where)
    if unread is not None:
        yield unread
        return
    pointer = _pointer(file, name, where, path)
    if pointer is not None:
        yield pointer
        return
    ending, compression = _ending(name)
    try:
        if ending in _TABLES:
            yield from table_texts(path or file.read(), where=where, field=field)
            return
        content = uncompressed(file, compression, where=where)
        if ending in _READERS:
            yield from _READERS[ending](content, where, field)
        elif ending in _PLAIN:
            yield _plain(content, where)
        else:
            yield from _by_content(content, where, ending, field)
    except (DamagedError, tarfile.TarError) as error:
        yield Unread(where, Reason.corrupt, f"is damaged or not whole: {error}")


def _plain(file: BinaryIO, where: str) -> RawDocument:
    try:
        return Text(where, file.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unread(where, Reason.not_utf8, f"is not UTF-8: {error}")


def _pointer(file: BufferedReader, name: str, where: str, path: Path | None) -> Unread | None:
    """Reports a file that is only a pointer to another, which must be fetched first."""
    head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    why, way_out = "stands for a file in {} that wasn't fetched", "fetch it ({})"
    if head.startswith(_GIT_LFS):
        tool, command = "Git LFS", "git lfs pull"
    elif _GIT_ANNEX.match(head):
        tool, command = "git-annex", "git annex get"
    elif name.endswith(".dvc") and _DVC.search(head):
        if path is None or path.with_suffix("").exists():
            return Unread(where, Reason.read_already, "stands for a file beside it")
        tool, command = "DVC", "dvc pull"
    else:
        return None
    return Unread(where, Reason.unreadable, why.format(tool), way_out.format(command))


def _by_content(file: BufferedReader, where: str, ending: str, field: str) -> Iterator[RawDocument]:
    """The content of a file with an unknown suffix, or none: JSON, or plain text if it is text."""
    file, documents = json_by_content(file, where, field)
    if documents is not None:
        yield from documents
        return
    head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    if not _is_text(head):
        for beginning, reason in _NOT_READ_BY_CONTENT.items():
            if head.startswith(beginning):
                yield Unread(where, Reason.corrupt, *reason)
                return
    yield _unknown(file, where, ending, head) if ending else _plain(file, where)


def _unknown(file: BinaryIO, where: str, ending: str, head: bytes) -> RawDocument:
    """A file with an unknown suffix as plain text, if its content is text."""
    if _is_text(head) and not _NUMBER.fullmatch(head):
        document = _plain(file, where)
        if isinstance(document, Text):
            return Text(where, document.text, unknown_ending=ending)
    if ending == _TORCH:
        return Unread(where, Reason.corrupt, *_PICKLE)
    why = f"is not text, and its ending {ending} isn't known"
    return Unread(where, Reason.unknown_ending, why)


def _is_text(head: bytes) -> bool:
    """Whether bytes can be the beginning of a text; they may end inside a character."""
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False


def _html(file: BinaryIO, where: str, field: str) -> Iterator[RawDocument]:
    try:
        yield Text(where, html_text(file.read()))
    except UnicodeDecodeError as error:
        yield Unread(where, Reason.not_utf8, f"is not UTF-8: {error}")


def _tar(file: BinaryIO, where: str, field: str) -> Iterator[RawDocument]:
    blocks = _TarBlocks(file)
    hidden_folders: set[str] = set()
    with tarfile.open(fileobj=blocks, mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members.clear()  # else it would keep all of them
            place = f"{where}, member {member.name!r}"
            hidden = _hidden_part(member.name)
            if member.name.startswith("/") or ".." in member.name.split("/"):
                yield Unread(place, Reason.corrupt, "is refused: its name leads out of the tar")
            elif hidden:
                if hidden not in hidden_folders:
                    yield Unread(f"{where}, member {hidden!r}", Reason.hidden, "has a hidden name")
                if member.isdir() or hidden != member.name:
                    hidden_folders.add(hidden)  # which counts once, as in a folder
            elif member.size < 0:
                raise DamagedError(f"a member's size leads back from byte {member.offset_data}")
            elif member.isreg() and not member.issparse():
                yield from _documents(_in_memory(tar, member), member.name, place, field)
            elif not member.isdir():
                why = "is refused: it is a link, a device or a sparse file"
                yield Unread(place, Reason.corrupt, why)
    # tarfile accepts a damaged header, or a missing end, as the two empty blocks that mark the end.
    if blocks.last_read != bytes(_TAR_BLOCK):
        raise DamagedError(f"no member and no end of the tar at byte {tar.offset}")
    while more := blocks.read(_BYTES_AT_ONCE):
        if more.strip(b"\0"):
            raise DamagedError(f"something follows the end of the tar at byte {tar.offset}")


def _hidden_part(name: str) -> str:
    """The path up to the first hidden part of a member's name; '' if there is none."""
    parts = name.split("/")
    first = next((number for number, part in enumerate(parts, 1) if is_hidden(part)), 0)
    return "/".join(parts[:first])


def _in_memory(tar: tarfile.TarFile, member: tarfile.TarInfo) -> BufferedReader:
    content = tar.extractfile(member)
    assert content is not None, "a regular member has content"
    return BufferedReader(io.BytesIO(content.read()))


class _TarBlocks:
    """A file for tarfile: seeks forward by reading, and remembers the last block."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self.last_read = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise DamagedError(f"a member's size leads back from byte {self._position}")
        while self._position < position:
            skipped = len(self._file.read(min(_BYTES_AT_ONCE, position - self._position)))
            if not skipped:
                break  # tarfile reads a byte after each seek, and so detects the end
            self._position += skipped

    def read(self, size: int) -> bytes:
        # In pieces: a header with a false size must not allocate that much memory.
        pieces = []
        while size > 0 and (piece := self._file.read(min(_BYTES_AT_ONCE, size))):
            pieces.append(piece)
            size -= len(piece)
        self.last_read = b"".join(pieces)
        self._position += len(self.last_read)
        return self.last_read


_READERS: dict[str, _Reader] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_values,
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".tar": _tar,
}
