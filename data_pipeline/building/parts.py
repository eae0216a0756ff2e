"""Parts of a large text: what a worker does with one, and how it knows that it is done already.

Owns the two passes over a part. The first writes the digests of its documents; when those of all
parts have been compared (`digests`), the second encodes the documents and writes its shards. What a
part becomes depends on the text and the settings alone. Leaves the order of work to `parted_build`.

A part's folder, `SOURCE-00000`, appears complete and on disk, or not at all.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from data_pipeline.atomic_files import name_folder, sync_tree, unfinished_name, write_file
from data_pipeline.building.baselines import BaselineCounts
from data_pipeline.building.digests import (
    RunWriter,
    kept_digests,
    repeated_in_part,
    repeated_in_range,
    run_path,
)
from data_pipeline.building.encoding import Encoder
from data_pipeline.building.source_writing import WrittenDocuments, write_documents
from data_pipeline.corpora.corpus import Corpus, kept_documents
from data_pipeline.corpora.raw_documents import FAILURES, LeftOut
from data_pipeline.extensions import load_extensions
from data_pipeline.progress import byte_progress
from data_pipeline.settings import DataError, OnCorrupt
from data_pipeline.shards.index import SPLITS, SplitEntry
from data_pipeline.shards.unfinished import DocumentHash, TextChanged
from data_pipeline.tokenizers.named import tokenizer_again
from data_pipeline.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all parts of a build have in common; `folder` is the build's hidden folder."""

    folder: Path
    tokenizer: tuple[str, str | None, int] | None = None
    """Name, definition and end of document; None if nothing is encoded."""
    extensions: tuple[str, ...] = ()
    """The modules that registered the tokenizer and the data sources."""
    shard_tokens: int = 0
    validation_fraction: float = 0.0
    on_corrupt: OnCorrupt = OnCorrupt.fail
    encoding_processes: int = 0
    """Processes that encode a part's documents; 0: the worker does."""

    def hashes(self, name: str) -> Path:
        """A file about the digests of the documents."""
        return self.folder / "hashes" / name


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a source; `index` is its place among the parts of all sources."""

    source: str
    number: int
    index: int
    corpus: Corpus

    @property
    def stem(self) -> str:
        """Its name in the hidden folder."""
        return f"{self.source}-{self.number:05d}"


@dataclass(frozen=True, kw_only=True)
class HashedPart:
    """What is known of a part after the first pass.

    `num_lines` is that of `Corpus.num_lines`. `left_out` lacks repeated texts, and its line numbers
    count from the part's beginning.
    """

    state: str
    num_texts: int
    num_runs: int
    num_lines: int
    left_out: dict[str, Any]

    def runs(self, job: Job, stem: str) -> list[Path]:
        """The files with its digests."""
        return [run_path(job.folder / "hashes", stem, number) for number in range(self.num_runs)]


@dataclass(frozen=True, kw_only=True)
class PartToWrite:
    """A part after the first pass, and what the parts before it mean for it."""

    part: Part
    hashed: HashedPart
    num_ranges: int
    first_number: int
    """Documents of its source before it."""
    first_line: int
    """Lines of its first file before it."""


@dataclass(frozen=True, kw_only=True)
class WrittenPart:
    """A complete part, as its folder's `part.json` says; `key` stands for what it was made of."""

    key: str
    left_out: dict[str, Any]
    splits: dict[str, SplitEntry]
    deflated_bytes: int

    def has_failures(self) -> bool:
        """Whether something was left out that would otherwise end a build."""
        return _has_failures(self.left_out)


def hash_part(job: Job, part: Part) -> HashedPart:
    """The first pass over a part: writes the digests of its texts, unless they are there."""
    path = job.hashes(f"{part.stem}.json")
    with _files_seen(job):
        found: HashedPart | None = _read(path, HashedPart)
        if (
            found is not None
            and found.state == part.corpus.state
            and not (job.on_corrupt is OnCorrupt.fail and _has_failures(found.left_out))
            and all(run.exists() for run in found.runs(job, part.stem))
        ):
            return found
        path.unlink(missing_ok=True)
        left_out, runs = LeftOut(), RunWriter(path.parent, part.stem)
        for document in _texts(part.corpus, left_out):
            runs.add(document)
        runs.write()
        hashed = HashedPart(
            state=part.corpus.state,
            num_texts=runs.num_texts,
            num_runs=runs.num_runs,
            num_lines=part.corpus.num_lines(),
            left_out=left_out.record(),
        )
        write_file(path, TypeAdapter(HashedPart).dump_json(hashed))
        return hashed


def _texts(corpus: Corpus, left_out: LeftOut) -> Iterator[bytes]:
    """The digests of a corpus's texts, repeated ones too."""
    try:
        for document in kept_documents(
            corpus.raw_documents(), left_out=left_out, is_repeated=lambda digest: False
        ):
            yield document.digest
    except DataError:
        if not corpus.begins_inside:
            raise
        # Again, to its end: the message must have the line's number in its file.
        numbered = corpus.after_lines(corpus.num_lines(before=True))
        for _ in numbered.raw_documents():
            pass
        raise


@dataclass(frozen=True, kw_only=True)
class Range:
    """A range of digests, to be compared over all parts."""

    number: int
    of: int
    runs: tuple[tuple[int, Path], ...]
    """Each run with its part's index."""


def compare_range(job: Job, digests: Range) -> NDArray[np.int64]:
    """Writes which texts of a range repeat an earlier one; returns the indices of their parts."""
    texts = repeated_in_range(digests.runs, number=digests.number, of=digests.of)
    path = range_path(job, digests.number)
    temporary = unfinished_name(path)
    with temporary.open("wb") as file:
        np.save(file, texts)
    temporary.rename(path)
    return texts[:, 0]


def range_path(job: Job, number: int) -> Path:
    """The file of a range's repeated texts."""
    return job.hashes(f"repeated-{number:05d}.npy")


def write_part(job: Job, given: PartToWrite) -> None:
    """The second pass over a part: writes its shards, unless they are complete.

    Raises TextChanged if its documents aren't those of the first pass.
    """
    part, folder = given.part, job.folder / "parts" / given.part.stem
    with _files_seen(job):
        ranges = (range_path(job, number) for number in range(given.num_ranges))
        repeated = repeated_in_part(ranges, part.index)
        expected = DocumentHash()
        add_kept(expected, job, given, repeated)
        key = _key(given, repeated, documents_hash=expected.hexdigest())
        found = read_part(folder)
        if (
            found is not None
            and found.key == key
            and not (job.on_corrupt is OnCorrupt.fail and found.has_failures())
        ):
            return
        unnamed = unfinished_name(folder)
        unnamed.mkdir()
        try:
            left_out = LeftOut()
            written = _write(job, given, unnamed, left_out=left_out, repeated=repeated)
            if written.documents_hash != expected.hexdigest():
                job.hashes(f"{part.stem}.json").unlink(missing_ok=True)
                raise TextChanged
            _describe(unnamed, written, key=key, left_out=left_out)
            sync_tree(unnamed)
            shutil.rmtree(folder, ignore_errors=True)
            try:
                name_folder(unnamed, folder)
            except OSError:  # a cluster started the same task twice, and the other was first
                found = read_part(folder)
                if found is None or found.key != key:
                    raise
        finally:
            shutil.rmtree(unnamed, ignore_errors=True)


def add_kept(
    documents_hash: DocumentHash, job: Job, given: PartToWrite, repeated: NDArray[np.int64]
) -> None:
    """Adds the documents of a part that are kept."""
    number = given.first_number
    for digests in kept_digests(given.hashed.runs(job, given.part.stem), repeated):
        documents_hash.add_many(number, digests)
        number += len(digests) // 32


def read_part(folder: Path) -> WrittenPart | None:
    """The complete part in a folder; None if there is none."""
    found: WrittenPart | None = _read(folder / "part.json", WrittenPart)
    return found


def read_baselines(folder: Path, part: WrittenPart) -> BaselineCounts:
    """What a complete part adds to its source's baselines."""
    with np.load(folder / "pairs.npz") as saved:
        pairs = {split: saved[split] for split in SPLITS}
    return BaselineCounts(pairs=pairs, deflated_bytes=part.deflated_bytes)


def _write(
    job: Job,
    given: PartToWrite,
    folder: Path,
    *,
    left_out: LeftOut,
    repeated: NDArray[np.int64],
) -> WrittenDocuments:
    assert job.tokenizer is not None
    corpus = given.part.corpus.after_lines(given.first_line)
    documents = kept_documents(
        corpus.raw_documents(), left_out=left_out, is_repeated=_in_turn(repeated)
    )
    with (
        Encoder(
            _tokenizer(*job.tokenizer, job.extensions), num_processes=job.encoding_processes
        ) as encoder,
        byte_progress("", num_bytes=0, shown=False) as counter,
    ):
        return write_documents(
            documents,
            folder=folder,
            source=given.part.source,
            encoder=encoder,
            shard_tokens=job.shard_tokens,
            validation_fraction=job.validation_fraction,
            first_number=given.first_number,
            finished={split: () for split in SPLITS},
            keep=lambda shard: None,  # a part is kept as a whole
            counter=counter,
        )


def _describe(folder: Path, written: WrittenDocuments, *, key: str, left_out: LeftOut) -> None:
    with (folder / "pairs.npz").open("wb") as file:
        np.savez_compressed(file, **written.baselines.pairs)  # type: ignore[arg-type]
    part = WrittenPart(
        key=key,
        left_out=left_out.record(),
        splits=written.splits,
        deflated_bytes=written.baselines.deflated_bytes,
    )
    (folder / "part.json").write_bytes(TypeAdapter(WrittenPart).dump_json(part))


def _in_turn(repeated: NDArray[np.int64]) -> Callable[[bytes], bool]:
    """Says of each text in turn whether it is repeated."""
    numbers = iter(range(2**63))
    left = iter(repeated.tolist())
    following = next(left, None)

    def is_repeated(digest: bytes) -> bool:
        nonlocal following
        if next(numbers) != following:
            return False
        following = next(left, None)
        return True

    return is_repeated


def _key(given: PartToWrite, repeated: NDArray[np.int64], *, documents_hash: str) -> str:
    """Stands for everything that decides a part's shards and what is said about it."""
    names = [file.name for file in given.part.corpus.files]
    told = json.dumps([documents_hash, given.first_line, given.hashed.left_out, names])
    return hashlib.sha256(told.encode() + repeated.tobytes()).hexdigest()


def _has_failures(left_out: dict[str, Any]) -> bool:
    return any(left_out["num"].get(reason) for reason in FAILURES)


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=1)
def _tokenizer(
    name: str, definition: str | None, end_of_document: int, extensions: tuple[str, ...]
) -> Tokenizer:
    # Cached: a worker meets many parts, and loading a vocabulary takes a second.
    load_extensions(extensions)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a worker already
    return tokenizer_again(name, definition=definition, end_of_document=end_of_document)


@contextmanager
def _files_seen(job: Job) -> Iterator[None]:
    """Raises DataError where the build's folder or a file of the text can't be seen."""
    try:
        if not job.folder.is_dir():
            raise FileNotFoundError(2, "No such file or directory", str(job.folder))
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} isn't there on {socket.gethostname()}: it was removed meanwhile, or "
            "this node of a cluster doesn't share it; name the text and `to` as every node sees "
            "them, on shared storage"
        ) from error
