"""Building a shard folder: corpora → documents → split → tokens → shards → index, in that order.

Owns the line from text to a complete folder, and what a later start need not do again. Leaves
each step to the file that is named for it.
"""

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from data_pipeline.building.baselines import BaselineCounter
from data_pipeline.building.bpe_training import bpe_size, trained_tokenizer
from data_pipeline.building.encoding import Encoder, num_encoding_processes, require_guarded_script
from data_pipeline.building.existing import (
    build_entry,
    corpora_of,
    existing_shards,
    refusing_place,
    tokenizer_given,
)
from data_pipeline.building.splits import split_of
from data_pipeline.building.text_record import (
    SourceText,
    write_text_record,
)
from data_pipeline.corpora.corpus import Corpus, Document, kept_documents
from data_pipeline.corpora.raw_documents import FAILURES, LeftOut, counts_text, reading_report
from data_pipeline.progress import ByteCounter, byte_progress, tell
from data_pipeline.settings import (
    TEXT_FIELD,
    BuildSettings,
    DataError,
    DataSettings,
    resolved_dir,
    sources_of,
)
from data_pipeline.shards.index import (
    FORMAT_VERSION,
    INDEX_NAME,
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

# What stands before the names of a build's settings in a run's.
_OF_A_RUN = "data."


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A document on its way: its number in its source, its split, and whether it is done."""

    number: int
    split: str
    document: Document
    is_finished: bool


def open_or_build(settings: DataSettings, *, progress: bool = True) -> ShardFolder:
    """The shards to train on: those in `settings.dir`, else the corpus's own, built when missing.

    Raises DataError where `settings.dir` is given and is no shard folder.
    """
    if settings.dir is not None:
        return open_folder(settings)
    build = _build_of(settings)
    is_new = not Path(build.to, INDEX_NAME).exists()
    shards = build_shards(build, progress=progress, prefix=_OF_A_RUN)
    for source in shards.index.sources if is_new else ():
        if any(source.num_left_out.values()) or source.unknown_endings:
            tell(f"{source.name}: {reading_report(asdict(source))}", shown=progress)
    return shards


def shards_or_corpus(settings: DataSettings) -> ShardFolder | Corpus:
    """The shards that `open_or_build` would open, else the corpus that it would build them of."""
    if settings.dir is not None:
        return open_folder(settings)
    build = _build_of(settings)
    existing = existing_shards(build, prefix=_OF_A_RUN)
    if existing is not None and not hidden_folder(build.to).exists():
        return existing
    (corpus,) = corpora_of(build, prefix=_OF_A_RUN).values()
    return corpus


def _build_of(settings: DataSettings) -> BuildSettings:
    return BuildSettings(
        corpus=settings.corpus,
        text_field=settings.text_field,
        tokenizer=settings.tokenizer,
        to=resolved_dir(settings),
        on_corrupt=settings.on_corrupt,
        on_changed=settings.on_changed,
    )


def open_folder(settings: DataSettings) -> ShardFolder:
    """The shards that the settings mean, which are there; raises DataError where they aren't."""
    return ShardFolder.open(
        resolved_dir(settings),
        on_corrupt=settings.on_corrupt,
        tokenizer=settings.tokenizer,
        cache=settings.cache,
    )


def build_shards(
    settings: BuildSettings, *, progress: bool = True, prefix: str = ""
) -> ShardFolder:
    """Makes the shard folder `settings.to`, or opens it where it is there and the same.

    The same text and settings give the same bytes in every file but `text.json`, which has the
    times of the text's files, whatever the number of processes and however often the build was
    stopped and started again. The folder is built in a hidden one beside its place and renamed when
    complete. `prefix` is what stands before the names of settings where they were given: `data.`.

    Raises DataError for a corpus or tokenizer there is none of, a source without documents to
    train on, and a place that holds something else, or shards whose text has changed since, unless
    they are to be built anew.
    """
    require_guarded_script()
    say = partial(tell, shown=progress)
    folder = Path(settings.to).absolute()
    existing = existing_shards(settings, progress=progress, prefix=prefix)
    if existing is not None and not hidden_folder(folder).exists():
        return existing
    corpora = corpora_of(settings, prefix=prefix)
    tokenizer = tokenizer_given(settings)
    with refusing_place(settings, prefix):
        hidden_folder(folder).mkdir(parents=True, exist_ok=True)
    with unfinished_build(folder, tell=say) as unfinished:
        # By a process that was waited for, or killed then.
        existing = existing_shards(settings, progress=progress, say=say, prefix=prefix)
        if existing is not None:
            return existing
        other = unfinished.claim(_demands(settings, tokenizer))
        if other is not None:
            say(f"{unfinished.path} was of a build with {other}; beginning anew")
        if unfinished.num_finished():
            say(f"going on in {unfinished.path}: {unfinished.num_finished()} shards are finished")
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
                f"{unfinished.path}, and the same command goes on from there"
            ) from error
        except OSError as error:
            if error.errno != errno.ENOSPC or error.filename is not None:
                raise
            # Where the disk is full, who writes to an open file isn't told which.
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
    """Writes all that isn't finished yet; raises TextChanged where what is no longer fits."""
    if bpe_size(settings):
        tokenizer = trained_tokenizer(unfinished, corpora, settings, progress=progress)
    num_bytes = sum(corpus.num_bytes for corpus in corpora.values())
    seen: set[bytes] = set()
    with (
        _encoder(tokenizer, settings) as encoder,
        byte_progress("building", num_bytes=num_bytes, shown=progress) as counter,
    ):
        sources, texts = list[SourceEntry](), dict[str, SourceText]()
        for name, corpus in corpora.items():
            entry, texts[name] = _write_source(
                unfinished, name, corpus, encoder, settings, seen=seen, counter=counter
            )
            sources.append(entry)
    if tokenizer is not None and tokenizer.definition is not None:
        (unfinished.shards / TOKENIZER_NAME).write_text(tokenizer.definition, encoding="utf-8")
    index = Index(
        format_version=FORMAT_VERSION,
        build=build_entry(settings),
        tokenizer=None if tokenizer is None else _tokenizer_entry(tokenizer),
        dtype=None if tokenizer is None else token_dtype(tokenizer.vocab_size).name,
        sources=tuple(sources),
    )
    write_text_record(unfinished.shards, texts)
    write_index(index, unfinished.shards)


def _encoder(
    tokenizer: Tokenizer | None, settings: BuildSettings
) -> AbstractContextManager[Encoder | None]:
    if tokenizer is None:
        return nullcontext()
    num_processes = num_encoding_processes(tokenizer, asked=settings.num_processes)
    return Encoder(tokenizer, num_processes=num_processes)


def _write_source(
    unfinished: UnfinishedBuild,
    name: str,
    corpus: Corpus,
    encoder: Encoder | None,
    settings: BuildSettings,
    *,
    seen: set[bytes],
    counter: ByteCounter,
) -> tuple[SourceEntry, SourceText]:
    """Writes the shards of one source, after those finished; text where there is no encoder."""
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
        for item, tokens in encoder.encoded(to_encode) if encoder else zip(items, repeat(None)):
            content = item.document.content
            documents_hash.add(item.number, item.document.digest)
            if not item.is_finished:
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
    """The documents of a source; raises TextChanged where those in finished shards have changed."""
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


def _demands(settings: BuildSettings, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What decides the bytes of a shard, and so whether a build can be gone on with."""
    sources = sources_of(settings)
    fields = {n: s.text_field for n, s in sources.items() if s.text_field != TEXT_FIELD}
    return {
        "format_version": FORMAT_VERSION,
        "sources": {name: source.corpus for name, source in sources.items()},
        # Only what isn't usual: a build that an older program began can be gone on with.
        **({"text_fields": fields} if fields else {}),
        "tokenizer": settings.tokenizer,
        "fingerprint": None if tokenizer is None else tokenizer.fingerprint,
        "validation_fraction": settings.validation_fraction,
        "shard_tokens": settings.shard_tokens,
    }
