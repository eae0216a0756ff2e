"""Building a shard folder: corpora → documents → split → tokens → shards → index, in that order.

Owns the sequence of steps from text to a complete folder, and which of them a resumed build can
skip. Leaves each step to the file that is named for it.
"""

import errno
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from data_pipeline.building.baselines import baselines_of
from data_pipeline.building.bpe_training import trained_tokenizer
from data_pipeline.building.encoding import (
    Encoder,
    num_cores,
    num_encoding_processes,
    require_guarded_script,
)
from data_pipeline.building.existing import (
    NamedBy,
    build_demands,
    build_entry,
    corpora_of,
    existing_shards,
    refusing_place,
    tokenizer_given,
)
from data_pipeline.building.parted_build import JoinedSource, parts_of, written_sources
from data_pipeline.building.parts import Job, Part
from data_pipeline.building.ray_workers import ray_workers
from data_pipeline.building.source_writing import write_documents
from data_pipeline.building.text_record import SourceText, write_text_record
from data_pipeline.building.workers import Workers, started_workers
from data_pipeline.corpora.corpus import Corpus, kept_documents
from data_pipeline.corpora.data_source import DATA_SOURCES
from data_pipeline.corpora.raw_documents import FAILURES, LeftOut, counts_text
from data_pipeline.progress import byte_progress, tell
from data_pipeline.settings import BuildOn, BuildSettings, DataError, sources_of
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
    TextChanged,
    UnfinishedBuild,
    hidden_folder,
    unfinished_build,
)
from data_pipeline.tokenizers.tokenizer import TOKENIZERS, Tokenizer, TokenizerEntry, token_dtype


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
        demands = build_demands(settings, tokenizer)
        parts = parts_of(corpora, shard_tokens=settings.shard_tokens)
        if parts is not None:
            demands["parts"] = len(parts)
        other = unfinished.claim(demands)
        if other is not None:
            say(f"{unfinished.path} was of a build with {other}; beginning anew")
        if unfinished.num_finished():
            say(f"resuming in {unfinished.path}: {unfinished.num_finished()} shards are finished")
        try:
            _write(unfinished, corpora, parts, tokenizer, settings, progress=progress)
        except TextChanged:
            say("the text isn't what the finished shards were made of; beginning anew")
            corpora = corpora_of(settings, named_by=named_by)
            parts = parts_of(corpora, shard_tokens=settings.shard_tokens)
            if parts is None:  # else each part says whether it is of the text as it is
                unfinished.discard()
            _write(unfinished, corpora, parts, tokenizer, settings, progress=progress)
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
    parts: list[Part] | None,
    tokenizer: Tokenizer | None,
    settings: BuildSettings,
    *,
    progress: bool,
) -> None:
    """Writes all unfinished shards; raises TextChanged if the finished ones no longer match."""
    if tokenizer is None:
        tokenizer = trained_tokenizer(unfinished, corpora, settings, progress=progress)
    if parts is None:
        written = _in_one_piece(unfinished, corpora, tokenizer, settings, progress=progress)
    else:
        written = _in_parts(unfinished, parts, tokenizer, settings, progress=progress)
    sources = [
        _source_entry(name, corpora[name], source, settings) for name, source in written.items()
    ]
    for entry in sources:
        if entry.splits["train"].num_documents == 0:
            unfinished.discard()
            left_out = written[entry.name].left_out
            raise DataError(_nothing_to_train_on(entry, left_out, settings))
    if tokenizer.definition is not None:
        (unfinished.shards / TOKENIZER_NAME).write_text(tokenizer.definition, encoding="utf-8")
    index = Index(
        format_version=FORMAT_VERSION,
        build=build_entry(settings),
        tokenizer=_tokenizer_entry(tokenizer),
        dtype=token_dtype(tokenizer.vocab_size).name,
        sources=tuple(sources),
    )
    texts = {
        name: SourceText(files=corpora[name].files, documents_hash=source.documents_hash)
        for name, source in written.items()
    }
    write_text_record(unfinished.shards, texts)
    write_index(index, unfinished.shards)


def _in_one_piece(
    unfinished: UnfinishedBuild,
    corpora: dict[str, Corpus],
    tokenizer: Tokenizer,
    settings: BuildSettings,
    *,
    progress: bool,
) -> dict[str, JoinedSource]:
    """Writes the shards of a small text: this process reads and writes, others tokenise."""
    num_processes = num_encoding_processes(tokenizer, asked=settings.num_processes)
    num_bytes = sum(corpus.num_bytes for corpus in corpora.values())
    seen: set[bytes] = set()
    sources = {}
    with (
        Encoder(tokenizer, num_processes=num_processes) as encoder,
        byte_progress("building", num_bytes=num_bytes, shown=progress) as counter,
    ):
        for name, corpus in corpora.items():
            left_out = LeftOut()
            written = write_documents(
                kept_documents(corpus.raw_documents(), left_out=left_out, seen=seen),
                folder=unfinished.shards,
                source=name,
                encoder=encoder,
                shard_tokens=settings.shard_tokens,
                validation_fraction=settings.validation_fraction,
                finished={split: unfinished.finished(f"{name}-{split}") for split in SPLITS},
                keep=unfinished.keep,
                counter=counter,
            )
            sources[name] = JoinedSource(
                left_out=left_out,
                splits=written.splits,
                baselines=baselines_of([written.baselines]),
                documents_hash=written.documents_hash,
            )
            if written.splits["train"].num_documents == 0:
                break  # nothing more is of use
    return sources


def _in_parts(
    unfinished: UnfinishedBuild,
    parts: list[Part],
    tokenizer: Tokenizer,
    settings: BuildSettings,
    *,
    progress: bool,
) -> dict[str, JoinedSource]:
    """Writes the shards of a large text: each worker those of its parts."""
    on_ray = settings.on is BuildOn.ray
    num_processes = settings.num_processes or num_cores()
    num_workers = min(num_processes, len(parts))
    each = num_processes // num_workers
    job = Job(
        folder=unfinished.path,
        tokenizer=(tokenizer.name, tokenizer.definition, tokenizer.end_of_document),
        extensions=_modules(tokenizer, settings),
        shard_tokens=settings.shard_tokens,
        validation_fraction=settings.validation_fraction,
        on_corrupt=settings.on_corrupt,
        # Of a text with fewer parts than cores, each part is encoded by several.
        encoding_processes=each if each > 1 and tokenizer.needs_processes and not on_ray else 0,
    )
    workers: AbstractContextManager[Workers] = (
        ray_workers(job, address=settings.ray_address, num_tasks=settings.num_processes)
        if on_ray
        else started_workers(job, num_workers=num_workers)
    )
    with workers as started:
        return written_sources(unfinished, job, parts, started, progress=progress)


def _modules(tokenizer: Tokenizer, settings: BuildSettings) -> tuple[str, ...]:
    """The modules of extensions that registered the tokenizer and the data sources."""
    modules = [
        DATA_SOURCES.module_of(source.corpus)
        for source in sources_of(settings).values()
        if source.corpus in DATA_SOURCES.names()
    ]
    if tokenizer.definition is None:
        modules.append(TOKENIZERS.module_of(tokenizer.name))
    return tuple(dict.fromkeys(module for module in modules if module))


def _source_entry(
    name: str, corpus: Corpus, source: JoinedSource, settings: BuildSettings
) -> SourceEntry:
    left_out = source.left_out
    return SourceEntry(
        name=name,
        description=corpus.description,
        language=sources_of(settings)[name].language,
        licence=sources_of(settings)[name].licence,
        num_left_out=left_out.num,
        left_out_examples={reason: tuple(named) for reason, named in left_out.examples.items()},
        unknown_endings=left_out.unknown_endings,
        ending_examples={end: tuple(named) for end, named in left_out.ending_examples.items()},
        splits=source.splits,
        baselines=source.baselines,
    )


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
