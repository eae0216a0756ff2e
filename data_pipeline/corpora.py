"""Corpora: the documents of a text source, in an order that no machine path decides.

Owns finding documents, and the rules by which one is left out: not UTF-8, empty, or the exact
copy of an earlier one. Leaves tokens, splits and shards to others.
"""

import gzip
import hashlib
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.settings import DataError

# Tests repeat the library's text, and what is installed beside it differs between machines.
_STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a corpus: its UTF-8 bytes, the same decoded, and the SHA-256 of the bytes."""

    content: bytes
    text: str
    digest: bytes


@dataclass(kw_only=True)
class LeftOut:
    """How many documents of a corpus were left out, by reason; grows as they are met."""

    not_utf8: int = 0
    empty: int = 0
    duplicate: int = 0


class Corpus(Protocol):
    """Something that yields the raw bytes of documents, always in the same order."""

    @property
    def description(self) -> str:
        """What it is, in words that hold on any machine."""
        ...

    @property
    def num_bytes(self) -> int:
        """Its size on disk, as an estimate of the work."""
        ...

    def raw_documents(self) -> Iterator[bytes]:
        """Each document's bytes."""
        ...


def open_corpus(spec: str) -> Corpus:
    """The corpus that `spec` names: `stdlib`, a folder, a text file, or JSON lines.

    Raises DataError where there is none.
    """
    if spec == "stdlib":
        return _standard_library()
    path = Path(spec)
    if path.is_dir():
        return _Files(path.name, path, tuple(_visible_files(path)))
    if path.is_file():
        return _Files(path.name, path.parent, (path.name,))
    raise DataError(
        f"corpus={spec!r} doesn't exist: it is neither 'stdlib' nor a file or folder here "
        f"({path.absolute()}); give 'stdlib', a folder of text files, a text file, or a "
        ".jsonl or .jsonl.gz file with a 'text' field"
    )


def kept_documents(raw: Iterable[bytes], *, left_out: LeftOut) -> Iterator[Document]:
    """The documents that are text and new, in order; counts the others in `left_out`."""
    seen: set[bytes] = set()
    for content in raw:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            left_out.not_utf8 += 1
            continue
        if not content:
            left_out.empty += 1
            continue
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            left_out.duplicate += 1
            continue
        seen.add(digest)
        yield Document(content=content, text=text, digest=digest)


@dataclass(frozen=True)
class _Files:
    description: str
    root: Path
    names: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        # A compressed file is counted by what text usually unpacks to: only the progress reads it.
        return sum(
            (self.root / name).stat().st_size * (4 if name.endswith(".gz") else 1)
            for name in self.names
        )

    def raw_documents(self) -> Iterator[bytes]:
        for name in self.names:
            path = self.root / name
            if name.endswith((".jsonl", ".jsonl.gz")):
                yield from _json_lines(path)
            else:
                yield path.read_bytes()


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    names = tuple(
        name for name in _visible_files(root, left_out=_STDLIB_LEFT_OUT) if name.endswith(".py")
    )
    if not names:
        raise DataError(
            f"corpus='stdlib': this Python has no library sources in {root}; "
            "give a folder of text files instead"
        )
    return _Files(f"standard library of Python {platform.python_version()}", root, names)


def _visible_files(root: Path, *, left_out: frozenset[str] = frozenset()) -> list[str]:
    """Paths relative to `root`, '/' between their parts, sorted; no hidden ones."""
    found = []
    for folder, subfolders, files in os.walk(root):
        # What is taken out here isn't walked: site-packages may hold a hundred thousand files.
        subfolders[:] = [n for n in subfolders if not n.startswith(".") and n not in left_out]
        relative = Path(folder).relative_to(root)
        found += [
            (relative / name).as_posix()
            for name in files
            if not name.startswith(".") and os.path.isfile(os.path.join(folder, name))
        ]
    return sorted(found)


def _json_lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_field(line, where=f"{path}, line {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error


def _text_field(line: bytes, *, where: str) -> bytes:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return line  # kept_documents counts it as not UTF-8
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where} has no 'text' field that holds a string")
    # A lone surrogate is legal JSON and not legal UTF-8; kept_documents counts it.
    return text.encode("utf-8", errors="surrogatepass")
