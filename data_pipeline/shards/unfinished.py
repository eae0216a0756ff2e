"""Unfinished builds: what a build has finished so far, kept for the next start to resume.

Owns the hidden folder next to the destination, its lock, the records of finished shards, and the
rule that a folder appears under its name complete and on disk, or not at all. Leaves the content
of a shard to `shards`, and which documents are in it to `builder`.

    .NAME.building/
      lock              held while a process builds here
      settings.json     the settings that decide the shards
      trained.json      the tokenizer, if the build trains one
      records/          one FinishedShard for each shard that is complete and on disk
      hashes/           of a large text: the digests of its documents, part by part
      parts/            and a folder for each part whose shards are complete and on disk
      moves.json        which shards of parts are on their way to `shards`
      shards/           becomes NAME
      replaced/         the previous NAME, for a moment
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from data_pipeline.atomic_files import name_folder, sync, sync_tree, write_file
from data_pipeline.locks import locked
from data_pipeline.shards.index import ShardEntry


class TextChanged(Exception):
    """The corpus no longer has the documents from which finished shards were made."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FinishedShard:
    """A shard that is complete and on disk.

    `documents_hash` is the `DocumentHash` of its documents and of the next one, if any: that one
    decides where the shard ends.
    """

    entry: ShardEntry
    documents_hash: str


class DocumentHash:
    """A running SHA-256 over the numbers and digests of documents."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, number: int, digest: bytes) -> None:
        """Adds the document with this number in its source, by the SHA-256 of its content."""
        self._hash.update(number.to_bytes(8, "big") + digest)

    def add_many(self, number: int, digests: bytes) -> None:
        """Adds the documents from this number on, by their joined digests."""
        rows = np.empty((len(digests) // 32, 40), np.uint8)
        numbers = np.arange(number, number + len(rows)).astype(">u8")
        rows[:, :8] = numbers.view(np.uint8).reshape(-1, 8)
        rows[:, 8:] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        self._hash.update(rows.data)

    def hexdigest(self) -> str:
        """The hash of everything that was added."""
        return self._hash.hexdigest()


class FinishedDocuments:
    """Says which documents of a split are in finished shards, and checks that they haven't changed.

    Both methods raise TextChanged if they have.
    """

    def __init__(self, shards: tuple[FinishedShard, ...]) -> None:
        self._shards = iter(shards)
        self._next_shard()

    def take(self, number: int, digest: bytes) -> bool:
        """Whether the next document of the split, with this number in its source, is finished."""
        if self._shard is None:
            return False
        self._hash.add(number, digest)
        if self._num_left == 0:  # the document that didn't fit into the shard
            self._check()
            self._next_shard()
            return self.take(number, digest)
        self._num_left -= 1
        return True

    def end(self) -> None:
        """Must be called after the last document of the split."""
        if self._shard is not None:
            self._check()
            self._next_shard()
        if self._shard is not None:
            raise TextChanged

    def _next_shard(self) -> None:
        self._shard = next(self._shards, None)
        self._hash = DocumentHash()
        self._num_left = self._shard.entry.num_documents if self._shard else 0

    def _check(self) -> None:
        assert self._shard is not None
        if self._num_left or self._hash.hexdigest() != self._shard.documents_hash:
            raise TextChanged


class UnfinishedBuild:
    """The hidden folder of one build, opened and locked by `unfinished_build`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards = path / "shards"
        self.hashes = path / "hashes"
        self.parts = path / "parts"
        self._moves = path / "moves.json"
        self._records = path / "records"
        self._settings = path / "settings.json"
        self._trained = path / "trained.json"
        self._replaced = path / "replaced"

    def claim(self, settings: dict[str, Any]) -> str | None:
        """Makes the folder one of a build with these settings; returns how its settings differed.

        If they differed, or the folder is new, its content is removed. Else only partly written
        files are removed.
        """
        wanted = json.loads(json.dumps(settings))
        try:
            found = json.loads(self._settings.read_bytes())
            differing = [key for key in wanted | found if wanted.get(key) != found.get(key)]
            # The order of `sources` matters, which comparing dictionaries would ignore.
            if not differing and json.dumps(wanted) != json.dumps(found):
                differing = ["sources"]
        except (OSError, ValueError):  # a new folder, or one whose build was killed at once
            found, differing = {}, [""]
        if differing:
            self.discard()
            write_file(self._settings, json.dumps(wanted, indent=1))
            return ", ".join(f"{key}={found.get(key)!r}" for key in differing) if found else None
        self.take_back()
        self._remove_half_written()
        return None

    def finished(self, prefix: str) -> tuple[FinishedShard, ...]:
        """The finished shards `PREFIX-00000.tar` and on, up to the first missing one."""
        found: list[FinishedShard] = []
        while True:
            shard = self._finished(f"{prefix}-{len(found):05d}")
            if shard is None:
                return tuple(found)
            found.append(shard)

    def keep(self, shard: FinishedShard) -> None:
        """Records a written shard, once its files are on disk."""
        sync(self.shards / shard.entry.file)
        sync(self.shards / shard.entry.documents)
        sync(self.shards)
        record = TypeAdapter(FinishedShard).dump_json(shard)
        write_file(self._record(Path(shard.entry.file).stem), record)

    def trained(self) -> str | None:
        """The `tokenizer.json` trained before; `check_trained` says whether it still applies."""
        try:
            definition: str = json.loads(self._trained.read_bytes())["definition"]
        except FileNotFoundError:
            return None
        return definition

    def keep_trained(self, definition: str, *, texts_hash: str) -> None:
        """Keeps a `tokenizer.json` and the hash of the texts that it was trained on."""
        record = {"texts_hash": texts_hash, "definition": definition}
        write_file(self._trained, json.dumps(record))

    def check_trained(self, *, texts_hash: str) -> None:
        """Raises TextChanged if the kept tokenizer was trained on texts with another hash."""
        if json.loads(self._trained.read_bytes())["texts_hash"] != texts_hash:
            raise TextChanged

    def num_finished(self) -> int:
        """The number of finished shards, of all sources and splits."""
        of_parts = len(list(self.parts.glob("[!.]*/*.tar")))
        return len(list(self._records.glob("*.json"))) + of_parts

    def move(self, shards: dict[str, str]) -> None:
        """Moves the shards of parts, by their paths in `parts`, to their names in the folder."""
        write_file(self._moves, json.dumps(shards))
        for place, name in shards.items():
            (self.parts / place).rename(self.shards / name)

    def take_back(self) -> None:
        """Moves shards back to their parts, if a build was stopped after it moved some."""
        if not self._moves.exists():
            return
        for place, name in json.loads(self._moves.read_bytes()).items():
            with suppress(FileNotFoundError):
                (self.shards / name).rename(self.parts / place)
        self._moves.unlink()

    def discard(self) -> None:
        """Discards all finished work; the build starts anew, with the same settings."""
        shutil.rmtree(self._replaced, ignore_errors=True)
        self._trained.unlink(missing_ok=True)
        # The records are removed first: a record must never exist without its shard.
        self._moves.unlink(missing_ok=True)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            sync(self.path)

    def complete(self, folder: Path) -> None:
        """Moves the shards to their destination: everything is synced to disk, then renamed once.

        An existing folder is moved aside, and removed with the hidden folder. A build that is
        killed between the two renames resumes from the finished shards.
        """
        sync_tree(self.shards)
        if folder.exists() and any(folder.iterdir()):
            folder.rename(self._replaced)
        name_folder(self.shards, folder)

    def close(self) -> None:
        """Removes the folder, unless a later start can resume from it."""
        is_begun = self.num_finished() or self._moves.exists() or self._trained.exists()
        if self.shards.exists() and (is_begun or any(self.hashes.glob("*.json"))):
            self.take_back()
            self._remove_half_written()
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def _folders(self) -> tuple[Path, ...]:
        return self._records, self.hashes, self.parts, self.shards

    def _record(self, stem: str) -> Path:
        return self._records / f"{stem}.json"

    def _finished(self, stem: str) -> FinishedShard | None:
        try:
            record = self._record(stem).read_bytes()
            shard: FinishedShard = TypeAdapter(FinishedShard).validate_json(record)
            size = (self.shards / shard.entry.file).stat().st_size
        except (OSError, ValueError):
            return None
        return shard if size == shard.entry.size else None

    def _remove_half_written(self) -> None:
        for folder in self._folders:
            folder.mkdir(exist_ok=True)
        for unnamed in self.parts.glob(".*.new"):
            shutil.rmtree(unnamed, ignore_errors=True)
        finished = {path.stem for path in self._records.glob("*.json")}
        for path in self.shards.iterdir():
            if path.name.removesuffix(".tar").removesuffix(".documents.npy") not in finished:
                path.unlink()


def hidden_folder(folder: str | Path) -> Path:
    """Where a shard folder is built; it exists while a build runs or can be resumed."""
    path = Path(folder).absolute()
    return path.with_name(f".{path.name}.building")


@contextmanager
def unfinished_build(folder: Path, *, tell: Callable[[str], None]) -> Iterator[UnfinishedBuild]:
    """The unfinished build of a shard folder, for one process at a time; others wait.

    At the end the finished shards, if any, are kept, and everything else is removed.
    """
    path = hidden_folder(folder)
    with locked(
        path / "lock",
        waiting=lambda: tell(f"waiting for the process that builds in {path}"),
        optional=True,  # some clusters' file systems have no locks: the user runs one builder
    ):
        unfinished = UnfinishedBuild(path)
        try:
            yield unfinished
        finally:
            unfinished.close()
