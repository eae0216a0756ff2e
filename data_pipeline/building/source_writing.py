"""Writing documents: split, encoded, stored in shards and counted, in the order of the source.

Owns what happens to each document of a source, or of a part of one. Leaves which documents these
are to `builder` and `parts`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.building.baselines import BaselineCounter, BaselineCounts
from data_pipeline.building.encoding import Encoder
from data_pipeline.building.splits import split_of
from data_pipeline.corpora.corpus import Document
from data_pipeline.progress import ByteCounter
from data_pipeline.shards.index import SPLITS, SplitEntry
from data_pipeline.shards.unfinished import DocumentHash, FinishedDocuments, FinishedShard
from data_pipeline.shards.writer import SplitWriter


@dataclass(frozen=True, kw_only=True)
class WrittenDocuments:
    """What was written, and the `DocumentHash` of all documents."""

    splits: dict[str, SplitEntry]
    baselines: BaselineCounts
    documents_hash: str


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A document in progress: its number in its source, its split, and whether it is finished."""

    number: int
    split: str
    document: Document
    is_finished: bool


def write_documents(
    documents: Iterable[Document],
    *,
    folder: Path,
    source: str,
    encoder: Encoder,
    shard_tokens: int,
    validation_fraction: float,
    first_number: int = 0,
    finished: Mapping[str, tuple[FinishedShard, ...]],
    keep: Callable[[FinishedShard], None],
    counter: ByteCounter,
) -> WrittenDocuments:
    """Writes documents into the shards of a folder, after those that are finished, by split.

    `first_number` is the number of the first document in its source. Raises TextChanged if those
    in finished shards have changed.
    """
    baselines, documents_hash = BaselineCounter(), DocumentHash()
    items = _items(
        documents, finished, first_number=first_number, validation_fraction=validation_fraction
    )
    to_encode = ((item, None if item.is_finished else item.document.content) for item in items)
    with ExitStack() as open_files:
        writers = {
            split: open_files.enter_context(
                SplitWriter(
                    folder,
                    source=source,
                    split=split,
                    shard_tokens=shard_tokens,
                    finished=finished[split],
                    keep=keep,
                )
            )
            for split in SPLITS
        }
        for item, tokens in encoder.encoded(to_encode):
            content = item.document.content
            documents_hash.add(item.number, item.document.digest)
            if tokens is not None:
                writers[item.split].write(
                    tokens, content=content, number=item.number, digest=item.document.digest
                )
            baselines.add(content, split=item.split)
            counter.advance(len(content))
    return WrittenDocuments(
        splits={split: writer.entry() for split, writer in writers.items()},
        baselines=baselines.counts(),
        documents_hash=documents_hash.hexdigest(),
    )


def _items(
    documents: Iterable[Document],
    finished: Mapping[str, tuple[FinishedShard, ...]],
    *,
    first_number: int,
    validation_fraction: float,
) -> Iterator[_Item]:
    done = {split: FinishedDocuments(shards) for split, shards in finished.items()}
    for number, document in enumerate(documents, start=first_number):
        split = split_of(document.digest, validation_fraction=validation_fraction)
        is_finished = done[split].take(number, document.digest)
        yield _Item(number=number, split=split, document=document, is_finished=is_finished)
    for each in done.values():
        each.end()
