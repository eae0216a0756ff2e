"""Building a shard folder: corpora → documents → split → tokens → shards → index, in that order.

Owns the sequence of steps from text to a complete folder, and which of them a resumed build can
skip. Leaves each step to the file that is named for it.
"""

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.building.baselines import BaselineCounter
from data_pipeline.building.bpe_training import trained_tokenizer
from data_pipeline.building.encoding import Encoder, num_encoding_processes, require_guarded_script
from data_pipeline.building.existing import (
    NamedBy,
    build_demands,
    build_entry,
    corpora_of,
    existing_shards,
    refusing_place,
    tokenizer_given,
)
from data_pipeline.building.splits import split_of
from data_pipeline.building.text_record import SourceText, write_text_record
from data_pipeline.corpora.corpus import Corpus, Document, kept_documents
from data_pipeline.corpora.raw_documents import FAILURES, LeftOut, counts_text
from data_pipeline.progress import ByteCounter, byte_progress, tell
from data_pipeline.settings import BuildSettings, DataError, sources_of
from data_pipeline.shards.index import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_NAME,
    Index,
    SourceEntry,
    write_index,
)
from data_pipeline.shards.reader import ShardFolder
from data_pipeline.shards.unfinished import (
    DocumentHash,
    FinishedDocuments,
    FinishedShard,
    TextChanged,
    UnfinishedBuild,
    hidden_folder,
    unfinished_build,
)
from data_pipeline.shards.writer import SplitWriter
from data_pipeline.tokenizers.tokenizer import Tokenizer, TokenizerEntry, token_dtype


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A document in progress: its number in its source, its split, and whether it is finished."""

    number: int
    split: str
    document: Document
    is_finished: bool


def build_shards(
    settings: BuildSettings, *, progress: bool = True, named_by: NamedBy = NamedBy.corpus
) -> ShardFolder:
    """Builds the shard folder `settings.to`, or opens it if it exists with the same content.

    The same text and settings give the same bytes in every file except `text.json`, which has the
    modification times of the text's files. The number of processes and any interruptions don't
    matter. The folder is built in a hidden one next to its destination and renamed when complete.
    `named_by` is the setting that named the text, for messages.

    Raises DataError for an unknown corpus or tokenizer, for a source without documents to train on,
    and for a destination that holds something else, or shards whose text has changed since, unless
    they are to be rebuilt.
    """
    require_guarded_script()
    say = partial(tell, shown=progress)
    folder = Path(settings.to).absolute()
    existing = existing_shards(settings, progress=progress, named_by=named_by)
    if existing is not None and not hidden_folder(folder).exists():
        return existing
    corpora = corpora_of(settings, named_by=named_by)
    tokenizer = tokenizer_given(settings)
    with refusing_place(settings, named_by):
        hidden_folder(folder).mkdir(parents=True, exist_ok=True)
    with unfinished_build(folder, tell=say) as unfinished:
        # Built by another process while this one waited, or by one that was killed at that point.
        existing = existing_shards(settings, progress=progress, say=say, named_by=named_by)
        if existing is not None:
            return existing
        other = unfinished.claim(build_demands(settings, tokenizer))
        if other is not None:
            say(f"{unfinished.path} was of a build with {other}; beginning anew")
        if unfinished.num_finished():
            say(f"resuming in {unfinished.path}: {unfinished.num_finished()} shards are finished")
        try:
            _write(unfinished, corpora, tokenizer, settings, progress=progress)
        except TextChanged:
            say("the text isn't what the finished shards were made of; beginning anew")
            unfinished.discard()
            _write(unfinished, corpora, tokenizer, settings, progress=progress)
        except DataError as error:
            if not unfinished.num_finished():
                unfinished.discard()
                raise
            raise DataError(
                f"{error}; {unfinished.num_finished()} finished shards are kept in "
                f"{unfinished.path}, and the same command resumes there"
            ) from error
        except OSError as error:
            if error.errno != errno.ENOSPC or error.filename is not None:
                raise
            # If the disk is full, an error of writing to an open file doesn't name the file.
            raise OSError(error.errno, error.strerror, str(unfinished.path)) from error
        unfinished.complete(folder)
    return ShardFolder.open(folder)


def _write(
    unfinished: UnfinishedBuild,
    corpora: dict[str, Corpus],
    tokenizer: Tokenizer | None,
    settings: BuildSettings,
    *,
    progress: bool,
) -> None:
    """Writes all unfinished shards; raises TextChanged if the finished ones no longer match."""
    if tokenizer is None:
        tokenizer = trained_tokenizer(unfinished, corpora, settings, progress=progress)
    num_processes = num_encoding_processes(tokenizer, asked=settings.num_processes)
    num_bytes = sum(corpus.num_bytes for corpus in corpora.values())
    seen: set[bytes] = set()
    with (
        Encoder(tokenizer, num_processes=num_processes) as encoder,
        byte_progress("building", num_bytes=num_bytes, shown=progress) as counter,
    ):
        sources, texts = list[SourceEntry](), dict[str, SourceText]()
        for name, corpus in corpora.items():
            entry, texts[name] = _write_source(
                unfinished, name, corpus, encoder, settings, seen=seen, counter=counter
            )
            sources.append(entry)
    if tokenizer.definition is not None:
        (unfinished.shards / TOKENIZER_NAME).write_text(tokenizer.definition, encoding="utf-8")
    index = Index(
        format_version=FORMAT_VERSION,
        build=build_entry(settings),
        tokenizer=_tokenizer_entry(tokenizer),
        dtype=token_dtype(tokenizer.vocab_size).name,
        sources=tuple(sources),
    )
    write_text_record(unfinished.shards, texts)
    write_index(index, unfinished.shards)


def _write_source(
    unfinished: UnfinishedBuild,
    name: str,
    corpus: Corpus,
    encoder: Encoder,
    settings: BuildSettings,
    *,
    seen: set[bytes],
    counter: ByteCounter,
) -> tuple[SourceEntry, SourceText]:
    """Writes the shards of one source, after those that are finished."""
    finished = {split: unfinished.finished(f"{name}-{split}") for split in SPLITS}
    left_out, baselines, documents_hash = LeftOut(), BaselineCounter(), DocumentHash()
    documents = kept_documents(corpus.raw_documents(), left_out=left_out, seen=seen)
    items = _items(documents, finished, validation_fraction=settings.validation_fraction)
    to_encode = ((item, None if item.is_finished else item.document.content) for item in items)
    with ExitStack() as open_files:
        writers = {
            split: open_files.enter_context(
                SplitWriter(
                    unfinished.shards,
                    source=name,
                    split=split,
                    shard_tokens=settings.shard_tokens,
                    finished=finished[split],
                    keep=unfinished.keep,
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
    source = SourceEntry(
        name=name,
        description=corpus.description,
        language=sources_of(settings)[name].language,
        licence=sources_of(settings)[name].licence,
        num_left_out=left_out.num,
        left_out_examples={reason: tuple(named) for reason, named in left_out.examples.items()},
        unknown_endings=left_out.unknown_endings,
        ending_examples={end: tuple(named) for end, named in left_out.ending_examples.items()},
        splits={split: writer.entry() for split, writer in writers.items()},
        baselines=baselines.baselines(),
    )
    if source.splits["train"].num_documents == 0:
        unfinished.discard()
        raise DataError(_nothing_to_train_on(source, left_out, settings))
    return source, SourceText(files=corpus.files, documents_hash=documents_hash.hexdigest())


def _items(
    documents: Iterator[Document],
    finished: dict[str, tuple[FinishedShard, ...]],
    *,
    validation_fraction: float,
) -> Iterator[_Item]:
    """The documents of a source; raises TextChanged if those in finished shards have changed."""
    done = {split: FinishedDocuments(shards) for split, shards in finished.items()}
    for number, document in enumerate(documents):
        split = split_of(document.digest, validation_fraction=validation_fraction)
        is_finished = done[split].take(number, document.digest)
        yield _Item(number=number, split=split, document=document, is_finished=is_finished)
    for each in done.values():
        each.end()


def _nothing_to_train_on(source: SourceEntry, left_out: LeftOut, settings: BuildSettings) -> str:
    failed = [left_out.why[reason] for reason in FAILURES if reason in left_out.why]
    return (
        f"source {source.name} (corpus={sources_of(settings)[source.name].corpus!r}) has no "
        f"document to train on: {source.splits['validation'].num_documents} for validation, left "
        f"out {counts_text(left_out.num, left_out.examples)}; "
        f"{''.join(f'{why}; ' for why in failed)}"
        "give a folder or file with more text, or a smaller validation_fraction"
    )


def _tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    return TokenizerEntry(
        name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        fingerprint=tokenizer.fingerprint,
        file=None if tokenizer.definition is None else TOKENIZER_NAME,
    )
