"""Building a shard folder: corpus → documents → tokens → split → shards → index, in that order.

Owns the line from text to a complete folder and the rule that a folder appears whole or not at
all. Leaves each step to the file that is named for it.
"""

import os
import re
import secrets
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from data_pipeline.baselines import BaselineCounter
from data_pipeline.corpora import Corpus, LeftOut, kept_documents, open_corpus
from data_pipeline.encoding import encoded_documents, num_encoding_processes
from data_pipeline.index import (
    FORMAT_VERSION,
    INDEX_NAME,
    SPLITS,
    BuildEntry,
    Index,
    SourceEntry,
    TokenizerEntry,
    write_index,
)
from data_pipeline.progress import byte_progress
from data_pipeline.reader import ShardFolder
from data_pipeline.settings import (
    BuildSettings,
    DataError,
    DataSettings,
    SourceSettings,
    resolved_dir,
    source_name,
)
from data_pipeline.shards import SplitWriter
from data_pipeline.tokenizers import Tokenizer, token_dtype, tokenizer_named


def open_or_build(settings: DataSettings, *, progress: bool = True) -> ShardFolder:
    """The shards to train on: those in `settings.dir`, else the corpus's own, built when missing.

    Raises DataError where `settings.dir` is given and is no shard folder.
    """
    folder = resolved_dir(settings)
    if settings.dir is not None:
        return ShardFolder.open(folder, on_corrupt=settings.on_corrupt)
    build = BuildSettings(corpus=settings.corpus, tokenizer=settings.tokenizer, to=str(folder))
    return build_shards(build, progress=progress)


def build_shards(settings: BuildSettings, *, progress: bool = True) -> ShardFolder:
    """Makes the shard folder `settings.to`, or opens it where it is there and the same.

    The same text and settings give the same bytes in every file, whatever the number of
    processes. The folder is written under another name beside its place and renamed when complete.

    Raises DataError for a corpus or tokenizer there is none of, a corpus without documents to
    train on, and a place that holds something else.
    """
    existing = existing_shards(settings)
    if existing is not None:
        return existing
    name = _checked_name(settings)
    tokenizer = tokenizer_named(settings.tokenizer)
    corpus = open_corpus(settings.corpus or "")
    folder = Path(settings.to).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.building-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        source = _write_source(partial, name, corpus, tokenizer, settings, progress=progress)
        write_index(_index(source, tokenizer, settings), partial)
        _flush_to_disk(partial)
        _take_place(partial, folder, settings)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is left there after a success
    return ShardFolder.open(folder)


def existing_shards(settings: BuildSettings) -> ShardFolder | None:
    """The folder `settings.to` where it was built with these settings; None where it is free.

    Raises DataError where it holds anything else.
    """
    folder = Path(settings.to).absolute()
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / INDEX_NAME).is_file():
        raise DataError(
            f"to={settings.to!r} is there and is no shard folder; give a folder that doesn't exist"
        )
    shards = ShardFolder.open(folder)
    wanted, found = asdict(_build_entry(settings)), asdict(shards.index.build)
    for key, value in wanted.items():
        if found[key] != value:
            raise DataError(
                f"to={settings.to!r} holds shards built with {key}={found[key]!r}, not "
                f"{key}={value!r}; give another folder, or remove that one"
            )
    if tokenizer_named(settings.tokenizer).fingerprint != shards.tokenizer.fingerprint:
        raise DataError(
            f"to={settings.to!r} holds shards of another version of tokenizer="
            f"{settings.tokenizer!r}; give another folder, or remove that one"
        )
    return shards


def split_of(digest: bytes, *, validation_fraction: float) -> str:
    """The split of a document, from the SHA-256 of its content alone.

    Whole percents decide first (`first four bytes, big-endian, mod 100`), so that anybody can
    check a split with sha256sum; what remains of the number refines them. Of the rules tried on
    the standard library this one was kept because its held-out text is as compressible as the
    text that the toy's target was set on (docs/architecture.md has the figures).
    """
    rest, percent = divmod(int.from_bytes(digest[:4], "big"), 100)
    share = (percent + rest * 100 / 2**32) / 100
    return "validation" if share < validation_fraction else "train"


def _write_source(
    folder: Path,
    name: str,
    corpus: Corpus,
    tokenizer: Tokenizer,
    settings: BuildSettings,
    *,
    progress: bool,
) -> SourceEntry:
    left_out, baselines = LeftOut(), BaselineCounter()
    documents = kept_documents(corpus.raw_documents(), left_out=left_out)
    num_processes = num_encoding_processes(tokenizer, asked=settings.num_processes)
    encoded = encoded_documents(documents, tokenizer=tokenizer, num_processes=num_processes)
    with ExitStack() as open_files:
        writers = {
            split: open_files.enter_context(
                SplitWriter(folder, prefix=f"{name}-{split}", shard_tokens=settings.shard_tokens)
            )
            for split in SPLITS
        }
        counter = open_files.enter_context(
            byte_progress(f"tokenising {name}", num_bytes=corpus.num_bytes, shown=progress)
        )
        for number, (document, tokens) in enumerate(encoded):
            split = split_of(document.digest, validation_fraction=settings.validation_fraction)
            writers[split].write(tokens, key=f"{number:09d}", num_bytes=len(document.content))
            baselines.add(document.content, split=split)
            counter.advance(len(document.content))
    entries = {split: writer.entry() for split, writer in writers.items()}
    if entries["train"].num_documents == 0:
        raise DataError(
            f"corpus={settings.corpus!r} has no document to train on: "
            f"{entries['validation'].num_documents} for validation, left out "
            f"{left_out.not_utf8} not UTF-8, {left_out.empty} empty, "
            f"{left_out.duplicate} duplicate; give a folder or file with more text"
        )
    return SourceEntry(
        name=name,
        description=corpus.description,
        language=settings.language,
        licence=settings.licence,
        num_left_out=asdict(left_out),
        splits=entries,
        baselines=baselines.baselines(),
    )


def _index(source: SourceEntry, tokenizer: Tokenizer, settings: BuildSettings) -> Index:
    return Index(
        format_version=FORMAT_VERSION,
        build=_build_entry(settings),
        tokenizer=TokenizerEntry(
            name=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            fingerprint=tokenizer.fingerprint,
        ),
        dtype=token_dtype(tokenizer.vocab_size).name,
        sources=(source,),
    )


def _build_entry(settings: BuildSettings) -> BuildEntry:
    return BuildEntry(
        sources={
            _checked_name(settings): SourceSettings(
                corpus=settings.corpus or "", language=settings.language, licence=settings.licence
            )
        },
        tokenizer=settings.tokenizer,
        end_of_document=settings.end_of_document,
        validation_fraction=settings.validation_fraction,
        shard_tokens=settings.shard_tokens,
        on_corrupt=settings.on_corrupt,
    )


def _checked_name(settings: BuildSettings) -> str:
    if settings.name is None:
        return source_name(settings.corpus or "")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", settings.name):
        raise DataError(
            f"name={settings.name!r} goes into file names and metric names: give up to 40 letters, "
            "digits, '-' and '_'"
        )
    return settings.name


def _flush_to_disk(folder: Path) -> None:
    """Makes sure that a rename can't outlive the bytes it makes visible."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_place(partial: Path, folder: Path, settings: BuildSettings) -> None:
    try:
        partial.rename(folder)
    except OSError:
        # Another process may have built the same folder meanwhile; then its work is as good.
        if existing_shards(settings) is None:
            raise
