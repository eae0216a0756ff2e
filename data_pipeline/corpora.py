"""Corpora: the documents of a text source, in an order that no machine path decides.

Owns finding files, and the rules by which a document is left out: not to be read, not UTF-8,
empty, or the exact copy of an earlier one. Leaves what is in a file to `text_files`, and tokens,
splits and shards to others.
"""

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.settings import DataError, OnCorrupt
from data_pipeline.text_files import RawDocument, read_documents, text_size

# Tests repeat the library's text, and what is installed beside it differs between machines.
_STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
# What the library `datasets` writes beside the files of a data set, and of one in splits.
_DATASET_STATE = "state.json"
_DATASET_INFO = "dataset_info.json"
_DATASET_SPLITS = "dataset_dict.json"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a corpus: its UTF-8 bytes, the same decoded, and the SHA-256 of the bytes."""

    content: bytes
    text: str
    digest: bytes


@dataclass(kw_only=True)
class LeftOut:
    """How many documents of a corpus were left out, by reason; grows as they are met.

    What is `corrupt` may have held any number of documents: a line, a member of a tar, or the
    rest of a file counts as one.
    """

    not_utf8: int = 0
    empty: int = 0
    duplicate: int = 0
    corrupt: int = 0


class Corpus(Protocol):
    """Something that yields documents as they are read, always in the same order."""

    @property
    def description(self) -> str:
        """What it is, in words that hold on any machine."""
        ...

    @property
    def num_bytes(self) -> int:
        """About how many bytes of text it holds, as an estimate of the work."""
        ...

    def raw_documents(self) -> Iterator[RawDocument]:
        """Each document's text, or the error for which it is left out.

        Raises DataError for a corrupt one where the corpus was opened to fail on it, and where a
        library to read it with is missing.
        """
        ...


def open_corpus(spec: str, *, on_corrupt: OnCorrupt) -> Corpus:
    """The corpus that `spec` names: `stdlib`, a folder, a data set saved to disk, or a file.

    `on_corrupt` says whether a corrupt document or file ends the reading or is passed over.

    Raises DataError where there is none, or no file in it.
    """
    if spec == "stdlib":
        return _standard_library(on_corrupt)
    if spec.startswith("pipe:"):
        raise DataError(
            f"corpus={spec!r} is refused: it would run a shell command, whatever it is; run it "
            "yourself, and give the file or folder that it makes"
        )
    path = Path(spec)
    if path.is_dir():
        names = _dataset_files(path)
        if names is None:
            names = _visible_files(path)
        if not names:
            raise DataError(
                f"corpus={spec!r} has no document to train on: no file is in it (hidden ones are "
                "passed over)"
            )
        return _Files(path.absolute().name, path, tuple(names), on_corrupt)
    if path.is_file():
        return _Files(path.name, path.parent, (path.name,), on_corrupt)
    raise DataError(
        f"corpus={spec!r} doesn't exist: it is neither 'stdlib' nor a file or folder here "
        f"({path.absolute()}); give 'stdlib', a folder of text files, a data set saved to disk, "
        "or a file of text, HTML, JSON lines, Parquet, or a tar of such"
    )


def kept_documents(
    raw: Iterable[RawDocument], *, left_out: LeftOut, seen: set[bytes] | None = None
) -> Iterator[Document]:
    """The documents that are text and new, in order; counts the others in `left_out`.

    `seen` holds the digests of those kept so far and is added to: sources that share one have no
    document in common. None: a set of its own.
    """
    seen = set() if seen is None else seen
    for text in raw:
        if isinstance(text, DataError):
            left_out.corrupt += 1
        elif isinstance(text, UnicodeDecodeError) or (content := _utf8(text)) is None:
            left_out.not_utf8 += 1
        elif not content:
            left_out.empty += 1
        elif (digest := hashlib.sha256(content).digest()) in seen:
            left_out.duplicate += 1
        else:
            seen.add(digest)
            yield Document(content=content, text=text, digest=digest)


def _utf8(text: str) -> bytes | None:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate is legal in JSON, and not in UTF-8
        return None


@dataclass(frozen=True)
class _Files:
    description: str
    root: Path
    names: tuple[str, ...]
    on_corrupt: OnCorrupt

    @property
    def num_bytes(self) -> int:
        return sum(text_size(self.root / name) for name in self.names)

    def raw_documents(self) -> Iterator[RawDocument]:
        for name in self.names:
            for document in read_documents(self.root / name):
                if isinstance(document, DataError) and self.on_corrupt is OnCorrupt.fail:
                    raise DataError(
                        f"{document}; repair it, or give on_corrupt=skip to leave it out and count"
                    )
                yield document


def _standard_library(on_corrupt: OnCorrupt) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    names = tuple(
        name for name in _visible_files(root, left_out=_STDLIB_LEFT_OUT) if name.endswith(".py")
    )
    if not names:
        raise DataError(
            f"corpus='stdlib': this Python has no library sources in {root}; "
            "give a folder of text files instead"
        )
    description = f"standard library of Python {platform.python_version()}"
    return _Files(description, root, names, on_corrupt)


def _visible_files(root: Path, *, left_out: frozenset[str] = frozenset()) -> list[str]:
    """Paths relative to `root`, '/' between their parts, sorted; no hidden ones."""
    found = []
    for folder, subfolders, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        names = _dataset_files(Path(folder))
        if names is not None:
            subfolders.clear()
        else:
            # What is taken out here isn't walked: site-packages may hold a hundred thousand files.
            subfolders[:] = [n for n in subfolders if not n.startswith(".") and n not in left_out]
            names = [
                name
                for name in files
                if not name.startswith(".") and os.path.isfile(os.path.join(folder, name))
            ]
        found += [(relative / name).as_posix() for name in names]
    return sorted(found)


def _dataset_files(folder: Path) -> list[str] | None:
    """The files of a data set that `datasets` saved, split by split; None where there is none.

    Paths are relative to the folder. Raises DataError where they can't be read or aren't there.
    """
    if (folder / _DATASET_SPLITS).is_file():
        files = []
        for split in _saved_names(folder / _DATASET_SPLITS, lambda saved: saved["splits"]):
            names = _dataset_files(folder / split)
            if names is None:
                raise DataError(f"{folder / split} is no data set, as {_DATASET_SPLITS} says it is")
            files += [f"{split}/{name}" for name in names]
        return files
    if not ((folder / _DATASET_STATE).is_file() and (folder / _DATASET_INFO).is_file()):
        return None
    state = folder / _DATASET_STATE
    if _saved_names(state, lambda saved: _filenames(saved.get("_indices_data_files") or ())):
        raise DataError(
            f"{state} was written by an old version of `datasets`, which kept the order of rows in "
            "a file of its own: load it with that library and save it again"
        )
    return _saved_names(state, lambda saved: _filenames(saved["_data_files"]))


def _filenames(entries: Iterable[Any]) -> list[Any]:
    return [entry["filename"] for entry in entries]


def _saved_names(path: Path, names_in: Callable[[Any], Iterable[Any]]) -> list[str]:
    """Names that a file of a saved data set gives, of files or folders that stand beside it."""
    try:
        names = [str(name) for name in names_in(json.loads(path.read_bytes()))]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not what `datasets` writes: {error!r}") from error
    for name in names:
        if name in ("", ".", "..") or "/" in name or not (path.parent / name).exists():
            raise DataError(f"{path} names {name!r}, which doesn't stand beside it")
    return names
