"""Corpora: the documents of a text source, in an order that depends on no machine's paths.

Owns the rules by which a document is left out: unreadable, not UTF-8, empty, or an exact duplicate
of an earlier one. Leaves the choice of files to `corpus_files`, reading a file to `text_files`, and
tokens, splits and shards to others.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from data_pipeline.commands.shell import text_setting
from data_pipeline.corpora.corpus_files import (
    CorpusFile,
    FoundFiles,
    corpus_file,
    found_files,
    is_shard_folder,
)
from data_pipeline.corpora.data_source import DATA_SOURCES, open_data_source
from data_pipeline.corpora.pieces import Piece, cut_files, num_lines_in
from data_pipeline.corpora.raw_documents import (
    FAILURES,
    LeftOut,
    RawDocument,
    Reason,
    Unread,
    counts_text,
    shown,
)
from data_pipeline.corpora.text_files import (
    is_one_document,
    read_documents,
    read_lines,
    refused,
)
from data_pipeline.settings import LONGEST_DOCUMENT, DataError, OnCorrupt, plain_source_name
from data_pipeline.storage import without_secrets

# Tests repeat the library's text, and other installed packages differ between machines.
_STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a corpus: its UTF-8 bytes, the decoded string, and the SHA-256 of the bytes."""

    content: bytes
    text: str
    digest: bytes


class Corpus(Protocol):
    """Something that yields documents as they are read, always in the same order."""

    @property
    def description(self) -> str:
        """A description that is the same on every machine."""
        ...

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """The files that contain its documents, in the order in which they are read."""
        ...

    @property
    def num_bytes(self) -> int:
        """Roughly how many bytes of text it holds, as an estimate of the work."""
        ...

    def parts(self, part_bytes: int) -> "Sequence[Corpus]":
        """The same documents as several corpora, to be read one after the other.

        Each has about `part_bytes` of text, more where a file can't be cut. They depend only on the
        corpus and `part_bytes`, and can be sent to another process.
        """
        ...

    @property
    def state(self) -> str:
        """Its files, or what it has of them, with their sizes and times."""
        ...

    @property
    def begins_inside(self) -> bool:
        """Whether it is a part whose first line isn't the first of its file."""
        ...

    def num_lines(self, *, before: bool = False) -> int:
        """How many lines of its last file a part has, if the next part has the following ones.

        Or how many lines of its first file come `before` it.
        """
        ...

    def after_lines(self, num_lines: int) -> "Corpus":
        """The same part, with the number of lines before its first, which messages need."""
        ...

    def raw_documents(self) -> Iterator[RawDocument]:
        """Yields each document's text, or why it is left out.

        Raises DataError for a corrupt document if the corpus was opened to fail on it, and if a
        library needed to read it is missing.
        """
        ...


def open_corpus(
    spec: str,
    *,
    on_corrupt: OnCorrupt,
    text_field: str = "text",
    max_document_bytes: int = LONGEST_DOCUMENT,
    options: Mapping[str, Any] = MappingProxyType({}),
    outputs: Iterable[Path] = (),
    setting: str = "corpus",
    sources: Collection[str] = (),
) -> Corpus:
    """The corpus that `spec` names: `stdlib`, a folder, a data set saved to disk, or a file.

    Or a data source that an extension has registered, with its `options`. `on_corrupt` says whether
    a corrupt document or file ends the reading or is skipped; one of more than `max_document_bytes`
    is corrupt. `text_field` names the text in JSON and tables. Folders that are being written,
    `outputs`, are not part of it. Messages refer to it by the
    `setting` that named it, and suggest no name that another of the `sources` has.

    Raises DataError if it doesn't exist, contains no file, or has something that can't be read.
    """
    if spec in DATA_SOURCES.names():
        try:
            return open_data_source(spec, options)
        except ValueError as error:
            raise DataError(f"{setting}_options={dict(options)}: {error}") from error
    if options:
        raise DataError(
            f"{setting}_options={dict(options)} are of a data source of an extension, and "
            f"{setting}={spec!r} is none: leave them out, or name its module in extensions=[…]"
        )
    if spec == "stdlib":
        return _standard_library(on_corrupt)
    if spec.startswith("pipe:"):
        raise DataError(
            f"{setting}={spec!r} is refused: it would run a shell command, whatever it is; run it "
            "yourself, and give the file or folder that it makes"
        )
    path = Path(spec)
    if path.is_dir():
        root, found = path, _in_folder(spec, path, outputs, setting=setting)
    elif path.is_file():
        root, found = path.parent, FoundFiles(files=(corpus_file(path.parent, path.name),))
    else:
        raise DataError(_no_such_corpus(spec, path, setting=setting, sources=sources))
    name = shown(path.absolute().name)
    corpus = _Files(name, root, found, on_corrupt, text_field, max_document_bytes)
    corpus.check_names()
    return corpus


def kept_documents(
    raw: Iterable[RawDocument],
    *,
    left_out: LeftOut,
    seen: set[bytes] | None = None,
    is_repeated: Callable[[bytes], bool] | None = None,
) -> Iterator[Document]:
    """Yields documents that are text and not duplicates, in order; counts the others in `left_out`.

    `seen` holds the digests of the documents kept so far and is updated: sources that share one
    have no document in common. None: a set of its own. Or `is_repeated` says of each text in turn,
    by its digest, whether it repeats an earlier one.
    """
    seen = set() if seen is None else seen
    is_repeated = is_repeated or partial(_add_to, seen)
    for document in raw:
        if isinstance(document, Unread):
            left_out.add(document.reason, document.where, f"{document.why}; {document.way_out}")
        elif (content := _utf8(document.text)) is None:
            left_out.add(Reason.not_utf8, document.where)
        elif not content or document.text.isspace():
            left_out.add(Reason.empty, document.where)
        elif is_repeated(digest := hashlib.sha256(content).digest()):
            left_out.add(Reason.duplicate, document.where)
        else:
            if document.unknown_ending:
                left_out.add_unknown_ending(document.unknown_ending, document.where)
            yield Document(content=content, text=document.text, digest=digest)


def _add_to(seen: set[bytes], digest: bytes) -> bool:
    num_before = len(seen)
    seen.add(digest)
    return len(seen) == num_before


def _utf8(text: str) -> bytes | None:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate is valid in JSON, but not in UTF-8
        return None


@dataclass(frozen=True)
class _Files:
    description: str
    root: Path
    found: FoundFiles
    on_corrupt: OnCorrupt
    text_field: str
    max_document_bytes: int = LONGEST_DOCUMENT
    pieces: tuple[Piece, ...] = ()
    """What of the files it has, if it is a part of a corpus."""
    num_lines_before: int = 0

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        return self.found.files

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces or map(Piece, self.files))

    def check_names(self) -> None:
        """Raises DataError for files that are known to be unreadable, before anything is read."""
        for unread in self.found.passed_over:
            self._check(unread)
        for file in self.files:
            known = refused(file.name, where=file.name)
            if known is not None:
                self._check(known)

    def parts(self, part_bytes: int) -> Sequence[Corpus]:
        return [
            replace(
                self,
                root=self.root.absolute(),
                found=FoundFiles(
                    files=tuple(piece.file for piece in pieces),
                    passed_over=() if number else self.found.passed_over,
                ),
                pieces=pieces,
            )
            for number, pieces in enumerate(cut_files(self.root, self.files, part_bytes))
        ]

    @property
    def begins_inside(self) -> bool:
        return bool(self.pieces) and self.pieces[0].begin > 0

    @property
    def state(self) -> str:
        return repr(self.pieces or self.files)

    def num_lines(self, *, before: bool = False) -> int:
        if before:
            first = self.pieces[0]
            return num_lines_in(self.root / first.file.name, begin=0, end=first.begin)
        last = self.pieces[-1]
        if last.end is None:
            return 0
        return num_lines_in(self.root / last.file.name, begin=last.begin, end=last.end)

    def after_lines(self, num_lines: int) -> Corpus:
        return replace(self, num_lines_before=num_lines)

    def raw_documents(self) -> Iterator[RawDocument]:
        yield from self.found.passed_over
        before = self.num_lines_before
        for piece in self.pieces or map(Piece, self.files):
            name = piece.file.name
            path = self.root / name
            if is_one_document(name) and piece.file.size > self.max_document_bytes:
                too_long = self._too_long(name, piece.file.size)
                self._check(too_long)
                yield too_long
                continue
            documents = (
                read_documents(path, where=name, field=self.text_field)
                if piece.end is None
                else read_lines(
                    path,
                    where=name,
                    field=self.text_field,
                    begin=piece.begin,
                    end=piece.end,
                    num_before=before,
                )
            )
            for document in documents:
                found = self._of_length(document)
                if isinstance(found, Unread):
                    self._check(found)
                yield found
            before = 0

    def _of_length(self, document: RawDocument) -> RawDocument:
        """The document, or that it is too long."""
        if isinstance(document, Unread) or len(document.text) <= self.max_document_bytes // 4:
            return document  # four bytes are the most that a character takes
        num_bytes = len(document.text.encode(errors="replace"))
        if num_bytes <= self.max_document_bytes:
            return document
        return self._too_long(document.where, num_bytes)

    def _too_long(self, where: str, num_bytes: int) -> Unread:
        why = f"has {num_bytes:,} bytes, more than max_document_bytes={self.max_document_bytes}"
        return Unread(where, Reason.corrupt, why, "raise that, cut the document")

    def _check(self, unread: Unread) -> None:
        """Raises DataError for something unreadable, unless it is to be skipped."""
        if self.on_corrupt is OnCorrupt.fail and unread.reason in FAILURES:
            raise DataError(
                f"{self.root / unread.where} {unread.why}; {unread.way_out}, or give "
                "on_corrupt=skip to leave it out and count"
            )


def _in_folder(spec: str, path: Path, outputs: Iterable[Path], *, setting: str) -> FoundFiles:
    if is_shard_folder(path):
        raise DataError(
            f"{setting}={spec!r} holds shards that were built, not text: "
            f"{text_setting('data.dir', spec)} trains on them; give the folder of the text"
        )
    found = found_files(path, outputs=outputs)
    if not found.files:
        left_out = LeftOut()
        for unread in found.passed_over:
            left_out.add(unread.reason, unread.where, f"{unread.why}; {unread.way_out}")
        failed = [left_out.why[reason] for reason in FAILURES if reason in left_out.why]
        way_out = failed or ["give a folder or file with text"]
        raise DataError(
            f"{setting}={spec!r} has no document to train on: no file is in it, and left out are "
            f"{counts_text(left_out.num, left_out.examples)}; {'; '.join(way_out)}"
        )
    return found


def _no_such_corpus(spec: str, path: Path, *, setting: str, sources: Collection[str]) -> str:
    if "://" in spec:
        return (
            f"{setting}={without_secrets(spec)!r} is on a server, and text is read from a disk: "
            "fetch it and give its folder (shards that were built may be on a server: data.dir)"
        )
    if path.is_symlink():
        return (
            f"{setting}={spec!r} is a link to {os.readlink(path)}, which isn't there; fetch what "
            "it stands for, or give a folder or file that is there"
        )
    several = [part.strip() for part in spec.split(",") if part.strip()]
    if len(several) > 1:
        names = _names_for(several, sources)
        named = zip(names, several, strict=True)
        given = (text_setting(f"sources.{name}.corpus", part) for name, part in named)
        return (
            f"{setting}={spec!r} doesn't exist: it is no file or folder here. Several texts are "
            f"several sources of python -m data_pipeline.build: give it {' '.join(given)} in "
            f"place of {setting} (and a run the folder that it makes, by data.dir)"
        )
    return (
        f"{setting}={spec!r} doesn't exist: it is neither 'stdlib' nor a file or folder here "
        f"({path.absolute()}); give 'stdlib', a folder of text files, a data set saved to disk, "
        "a file of text, HTML, JSON, Parquet, or a tar of such, or a data source that a module "
        "named in extensions=[…] registers"
    )


def _names_for(corpora: Iterable[str], taken: Collection[str]) -> list[str]:
    """A unique name for each corpus: `a/data` and `b/data` are data and data-2."""
    names = list(taken)
    for corpus in corpora:
        name = nearest = plain_source_name(corpus) or "text"
        number = 1
        while name in names:
            number += 1
            name = f"{nearest[:35]}-{number}"
        names.append(name)
    return names[len(taken) :]


def _standard_library(on_corrupt: OnCorrupt) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    found = found_files(root, not_walked=_STDLIB_LEFT_OUT)
    sources = FoundFiles(files=tuple(file for file in found.files if file.name.endswith(".py")))
    if not sources.files:
        raise DataError(
            f"corpus='stdlib': this Python has no library sources in {root}; "
            "give a folder of text files instead"
        )
    description = f"standard library of Python {platform.python_version()}"
    return _Files(description, root, sources, on_corrupt, text_field="text")
