"""The files of a corpus: which files of a folder are read, in which order, and which are skipped.

Owns walking through folders and links, and the data sets in them that `datasets` saved. Leaves
reading a file to `text_files`, and the handling of unreadable ones to `corpora`.
"""

import errno
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.corpora.raw_documents import Reason, Unread
from data_pipeline.corpora.text_files import ALLOW, is_hidden
from data_pipeline.settings import DataError

# What the library `datasets` writes next to the files of a data set, and of one with splits.
_DATASET_STATE = "state.json"
_DATASET_INFO = "dataset_info.json"
_DATASET_SPLITS = "dataset_dict.json"
# A link to a missing target, to itself, or into another user's folder.
_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM)
_FETCH = "fetch what it stands for (git annex get, dvc pull, hf download)"
# What a run's folder contains from its first step on.
_RUN_FILES = ("config.yaml", "events.jsonl", "metrics.jsonl")
# How the index of a folder of shards begins.
_SHARDS_INDEX = "index.json"
_SHARDS_BEGINNING = b'{\n "format_version":'
_SHARDS_TABLE = ".documents.npy"


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """A file of a corpus: its path relative to the corpus's folder, with '/', and its state."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class FoundFiles:
    """The files of a folder in the order in which they are read, and what was skipped."""

    files: tuple[CorpusFile, ...]
    passed_over: tuple[Unread, ...] = ()


def found_files(
    root: Path,
    *,
    not_walked: frozenset[str] = frozenset(),
    outputs: Iterable[Path] = (),
) -> FoundFiles:
    """The files below `root` by their paths, sorted; those of a data set, in its own order.

    Links are followed, and each folder is read once, by its own path if that is below `root`.
    Folders with a name in `not_walked`, and the folders `outputs`, are ignored.

    Raises DataError for an inconsistent data set, and OSError for a failing disk.
    """
    try:
        names = _dataset_files(root)
    except PermissionError:  # the walk reports it
        names = None
    if names is not None:
        return FoundFiles(files=tuple(corpus_file(root, name) for name in names))
    walk = _Walk(root, not_walked, frozenset(map(os.path.realpath, outputs)))
    walk.run()
    return FoundFiles(
        files=tuple(sorted(walk.files, key=lambda file: file.name)),
        passed_over=tuple(sorted(walk.passed_over, key=lambda unread: unread.where)),
    )


def corpus_file(root: Path, name: str) -> CorpusFile:
    """The file of that name below `root`, as it is now."""
    return _as_found(name, (root / name).stat())


def is_shard_folder(folder: str | Path) -> bool:
    """Whether a folder holds shards that were built, rather than text."""
    try:
        with open(os.path.join(folder, _SHARDS_INDEX), "rb") as file:
            return file.read(len(_SHARDS_BEGINNING)) == _SHARDS_BEGINNING
    except OSError:
        return False


def is_text(where: str | Path) -> bool:
    """Whether a path is text: a file, or a folder that holds files other than shards.

    A folder that contains a folder of shards isn't text, nor is one with shards but no index.
    """
    if os.path.isfile(where):
        return True
    try:
        with os.scandir(where) as found:
            entries = [entry for entry in found if not is_hidden(entry.name)]
    except OSError:
        return False
    shards = is_shard_folder(where) or any(
        entry.name.endswith(_SHARDS_TABLE) or (entry.is_dir() and is_shard_folder(entry.path))
        for entry in entries
    )
    return bool(entries) and not shards


def _is_run_folder(folder: str) -> bool:
    return all(os.path.isfile(os.path.join(folder, name)) for name in _RUN_FILES)


def _as_found(name: str, found: os.stat_result) -> CorpusFile:
    return CorpusFile(name=name, size=found.st_size, mtime_ns=found.st_mtime_ns)


@dataclass
class _Walk:
    """A walk through the folders below `root`; those that only a link leads to come last."""

    root: Path
    not_walked: frozenset[str]
    outputs: frozenset[str]
    files: list[CorpusFile] = field(default_factory=list)
    passed_over: list[Unread] = field(default_factory=list)
    # Folders still to be read, as names below the root and as paths without links.
    _folders: deque[tuple[str, str]] = field(default_factory=deque)
    _links: deque[tuple[str, str]] = field(default_factory=deque)

    def run(self) -> None:
        self._folders.append(("", os.path.realpath(self.root)))
        walked: dict[str, str] = {}
        while self._folders or self._links:
            name, real = (self._folders or self._links).popleft()
            if real in walked:
                other = walked[real] or "the corpus's own folder"
                self._pass_over(name, Reason.read_already, f"leads to {other}, which is read")
            elif is_shard_folder(real) or _is_run_folder(real):
                self._pass_over(name, Reason.output, "holds shards or a run, not text")
            else:
                walked[real] = name
                self._read_folder(name, real)

    def _read_folder(self, name: str, real: str) -> None:
        prefix = f"{name}/" if name else ""
        try:
            with os.scandir(self.root / name) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            saved = _dataset_files(self.root / name)
        except PermissionError as error:
            why = f"can't be listed: {error.strerror}"
            self._pass_over(name or ".", Reason.unreadable, why, ALLOW)
            return
        if saved is not None:
            self.files += [corpus_file(self.root, prefix + file) for file in saved]
            return
        for entry in entries:
            self._meet(entry, prefix + entry.name, f"{real}/{entry.name}")

    def _meet(self, entry: "os.DirEntry[str]", name: str, place: str) -> None:
        if place in self.outputs or entry.name in self.not_walked:
            return
        if is_hidden(entry.name):
            self._pass_over(name, Reason.hidden, "has a hidden name")
            return
        try:
            found = entry.stat()
        except OSError as error:
            if error.errno not in _LEADS_NOWHERE:
                raise
            self._pass_over(name, Reason.unreadable, *_leads_nowhere(entry, error))
            return
        if stat.S_ISREG(found.st_mode):
            self.files.append(_as_found(name, found))
        elif not stat.S_ISDIR(found.st_mode):
            self._pass_over(name, Reason.not_a_file, "is a pipe, a socket or a device")
        elif not entry.is_symlink():
            self._folders.append((name, place))
        elif (target := os.path.realpath(entry.path)) not in self.outputs:
            self._links.append((name, target))

    def _pass_over(self, name: str, reason: Reason, *why: str) -> None:
        self.passed_over.append(Unread(name, reason, *why))


def _leads_nowhere(entry: "os.DirEntry[str]", error: OSError) -> tuple[str, str]:
    """Why an entry of a folder has no target, and what to do about it."""
    why = f"can't be read: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM) or not entry.is_symlink():
        return why, ALLOW
    return f"is a link to {os.readlink(entry.path)}, which {why}", _FETCH


def _dataset_files(folder: Path) -> list[str] | None:
    """The files of a data set that `datasets` saved, split by split; None if there is none.

    Paths are relative to the folder. Raises DataError if they are missing or can't be read.
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
    """Names that a file of a saved data set lists, of files or folders in the same folder."""
    try:
        names = [str(name) for name in names_in(json.loads(path.read_bytes()))]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not what `datasets` writes: {error!r}") from error
    for name in names:
        if name in ("", ".", "..") or "/" in name or not (path.parent / name).exists():
            raise DataError(f"{path} names {name!r}, which doesn't stand beside it")
    return names
