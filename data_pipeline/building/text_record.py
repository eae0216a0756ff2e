"""What a shard folder was built from: the files of the text at that time, and its documents' hash.

Owns the record, `text.json` next to the shards, and detecting changes of the text. Leaves the
choice of files to `corpus_files`, and the handling of shards whose text has changed to `builder`.

Only a build reads it. Shards that are copied to a machine without their text, or whose record is
removed, are trained on as they are.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.atomic_files import write_file
from data_pipeline.building.parted_build import compared_parts, documents_hashes, parts_of
from data_pipeline.building.parts import Job
from data_pipeline.building.workers import Here
from data_pipeline.corpora.corpus import Corpus, kept_documents
from data_pipeline.corpora.corpus_files import CorpusFile
from data_pipeline.corpora.raw_documents import LeftOut
from data_pipeline.progress import byte_progress
from data_pipeline.settings import DataError
from data_pipeline.shards.unfinished import DocumentHash

TEXT_NAME = "text.json"

_NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class SourceText:
    """The text of a source: its files, and the `DocumentHash` of the documents that were kept."""

    files: tuple[CorpusFile, ...]
    documents_hash: str


def write_text_record(folder: Path, texts: Mapping[str, SourceText]) -> None:
    """Writes `text.json` into a folder, atomically."""
    record = {name: asdict(text) for name, text in texts.items()}
    write_file(folder / TEXT_NAME, json.dumps(record, indent=1) + "\n")


def read_text_record(folder: Path, *, sources: Iterable[str]) -> dict[str, SourceText] | None:
    """The texts of a folder's sources; None if there is no record, as in older versions' folders.

    Raises DataError for one that can't be read.
    """
    path = folder / TEXT_NAME
    try:
        record = json.loads(path.read_bytes())
        return {
            name: SourceText(
                files=tuple(CorpusFile(**file) for file in record[name]["files"]),
                documents_hash=record[name]["documents_hash"],
            )
            for name in sources
        }
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} is damaged: {error!r}; remove it, and the text is taken for unchanged"
        ) from error


def text_change(
    folder: Path, before: Mapping[str, SourceText], corpora: Mapping[str, Corpus], *, progress: bool
) -> str | None:
    """What has changed in the text since the shards in a folder were built; None for nothing.

    Names and sizes are compared, then times. If only times differ, the text is read; if it is
    unchanged, the record gets the new times.
    """
    listed = {name: _listed(before[name].files, corpus.files) for name, corpus in corpora.items()}
    if any(listed.values()):
        return "; ".join(f"source {name}: {what}" for name, what in listed.items() if what)
    touched = {
        name: [
            new.name
            for old, new in zip(before[name].files, corpus.files, strict=True)
            if old != new
        ]
        for name, corpus in corpora.items()
    }
    if not any(touched.values()):
        return None
    hashes = _documents_hashes(corpora, near=folder, progress=progress)
    if other := [name for name in corpora if hashes[name] != before[name].documents_hash]:
        return "; ".join(
            f"source {name}: other text in {_named('written since', touched[name]) or 'it'}"
            for name in other
        )
    texts = {
        name: SourceText(files=corpus.files, documents_hash=hashes[name])
        for name, corpus in corpora.items()
    }
    with suppress(OSError):  # not ours to write: the text is read again next time
        write_text_record(folder, texts)
    return None


def _listed(before: Sequence[CorpusFile], now: Sequence[CorpusFile]) -> str:
    """How two lists of files differ in names and sizes, in words; empty if they don't."""
    were, are = ({file.name: file.size for file in files} for files in (before, now))
    parts = (
        _named("added", [name for name in are if name not in were]),
        _named("gone", [name for name in were if name not in are]),
        _named("of another size", [n for n in are if n in were and are[n] != were[n]]),
    )
    found = ", ".join(part for part in parts if part)
    reordered = not found and [file.name for file in before] != [file.name for file in now]
    return "the order of its files" if reordered else found


def _named(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    number = f"{len(names):,} file{'s' if len(names) > 1 else ''}"
    more = ", …" if len(names) > _NUM_NAMED else ""
    return f"{number} {what} ({', '.join(names[:_NUM_NAMED])}{more})"


def _documents_hashes(
    corpora: Mapping[str, Corpus], *, near: Path, progress: bool
) -> dict[str, str]:
    """The `DocumentHash` of each source's documents, as a build would keep them.

    The digests of a large text are in files `near` its shards for that time.
    """
    parts = parts_of(corpora, shard_tokens=0)
    if parts is not None:
        with _temporary_folder(near) as temporary:
            job = Job(folder=temporary)
            job.hashes("").mkdir()
            return documents_hashes(job, compared_parts(job, parts, Here(job), progress=progress))
    num_bytes = sum(corpus.num_bytes for corpus in corpora.values())
    seen: set[bytes] = set()
    hashes = {}
    with byte_progress("comparing the text", num_bytes=num_bytes, shown=progress) as counter:
        for name, corpus in corpora.items():
            documents_hash = DocumentHash()
            documents = kept_documents(corpus.raw_documents(), left_out=LeftOut(), seen=seen)
            for number, document in enumerate(documents):
                documents_hash.add(number, document.digest)
                counter.advance(len(document.content))
            hashes[name] = documents_hash.hexdigest()
    return hashes


@contextmanager
def _temporary_folder(near: Path) -> Iterator[Path]:
    """A folder on the same disk, if that can be written, which is large enough."""
    place = near.parent if os.access(near.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{near.name}.", suffix=".new") as folder:
        yield Path(folder)
