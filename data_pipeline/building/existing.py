"""What already exists of a build: the shards that it would make, or something else."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

from data_pipeline.building.bpe_training import bpe_size
from data_pipeline.building.text_record import read_text_record, text_change
from data_pipeline.commands.shell import text_setting
from data_pipeline.corpora.corpus import Corpus, open_corpus
from data_pipeline.corpora.raw_documents import FAILURES
from data_pipeline.settings import (
    LONGEST_DOCUMENT,
    TEXT_FIELD,
    BuildSettings,
    DataError,
    OnChanged,
    sources_of,
)
from data_pipeline.shards.index import (
    FORMAT_VERSION,
    INDEX_NAME,
    BuildEntry,
    Index,
    TextEntry,
    encodable,
)
from data_pipeline.shards.reader import ShardFolder
from data_pipeline.shards.unfinished import hidden_folder
from data_pipeline.storage import without_secrets
from data_pipeline.tokenizers.named import tokenizer_named
from data_pipeline.tokenizers.tokenizer import Tokenizer

# Errors of creating a folder that a different path would avoid.
_NO_PLACE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)


class NamedBy(StrEnum):
    """The setting that names the text of a build, for messages: of a build, or of a run."""

    corpus = "corpus"
    data_corpus = "data.corpus"
    data_dir = "data.dir"


def existing_shards(
    settings: BuildSettings,
    *,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
    named_by: NamedBy = NamedBy.corpus,
) -> ShardFolder | None:
    """The folder `settings.to` if it was built with these settings from the text as it is now.

    Returns None if the folder doesn't exist, and if the text has changed and is to be rebuilt,
    which is reported to `say`. Raises DataError if it holds anything else.
    """
    folder = Path(settings.to).absolute()
    if "://" in settings.to:
        raise DataError(
            f"to={without_secrets(settings.to)!r} is on a server, and shards are built on a disk: "
            "give a folder on one, and copy it there when it is complete (data.dir may be on a "
            "server)"
        )
    with refusing_place(settings, named_by):
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
    of_build = named_by is NamedBy.corpus
    place = f"{'to' if of_build else 'data.dir'}={settings.to!r}"
    another = "give another folder" if of_build else "give other shards by data.dir"
    if not (folder / INDEX_NAME).is_file():
        raise DataError(f"{place} is there and is no shard folder; move it away, or {another}")
    shards = ShardFolder.open(folder, on_corrupt=settings.on_corrupt)
    index = shards.index
    if differing := differing_setting(settings, index):
        key, found, wanted = differing
        raise DataError(
            f"{place} holds shards built with {key}={found!r}, not {key}={wanted!r}; {another}, or "
            "remove that one"
        )
    tokenizer = tokenizer_given(settings)
    if tokenizer and tokenizer.fingerprint != index.tokenizer.fingerprint:
        raise DataError(
            f"{place} holds shards of another version of tokenizer={settings.tokenizer!r}; "
            f"{another}, or remove that one"
        )
    change = _text_change(settings, folder, progress=progress, named_by=named_by)
    if change is None:
        return shards
    if settings.on_changed is OnChanged.rebuild:
        if say is not None:
            say(f"the text of {folder} has changed ({change}); building it anew")
        return None
    raise DataError(
        f"{place} holds shards of another text: {change}; build them anew with "
        f"on_changed=rebuild (data.on_changed=rebuild where a run builds them), {another}, "
        f"or train on them as they are with {text_setting('data.dir', str(folder))}"
    )


def differing_setting(settings: BuildSettings, index: Index) -> tuple[str, Any, Any] | None:
    """A setting that differs: its name, the shards' value and the wanted one; None if none does."""
    wanted, found = (encodable(asdict(entry)) for entry in (build_entry(settings), index.build))
    if not any(source.num_left_out.get(reason) for source in index.sources for reason in FAILURES):
        # Nothing was corrupt, so that these settings made no difference.
        del wanted["on_corrupt"], wanted["max_document_bytes"]
    for key, value in wanted.items():
        # As text: the order of sources matters, which comparing dictionaries would ignore.
        if repr(found[key]) != repr(value):
            return key, found[key], value
    return None


@contextmanager
def refusing_place(settings: BuildSettings, named_by: NamedBy) -> Iterator[None]:
    """Raises DataError if no folder can be created at the destination of the shards."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        what, way_out = f"to={settings.to!r}", "give a folder of a disk that you may write to"
        if named_by is not NamedBy.corpus:  # a run has no such setting
            what = f"the folder for shards of {named_by}={settings.corpus!r}"
            way_out = "start in another folder, or give shards that are there by data.dir=…"
        if named_by is NamedBy.data_dir:
            way_out = "name a folder that you may write to with data.cache.dir=DIR"
        raise DataError(
            f"{what} can't be made: {error.filename}: {error.strerror}; {way_out}"
        ) from error


def _text_change(
    settings: BuildSettings, folder: Path, *, progress: bool, named_by: NamedBy
) -> str | None:
    """How the text differs from that of the shards in a folder; None if it doesn't.

    If the record of the text was removed, the shards are accepted as they are.
    """
    before = read_text_record(folder, sources=sources_of(settings))
    if before is None:
        return None
    try:
        corpora = corpora_of(settings, named_by=named_by)
        return text_change(folder, before, corpora, progress=progress)
    except DataError as error:
        raise DataError(
            f"{error}; {folder} holds the shards that were built from it before: "
            f"{text_setting('data.dir', str(folder))} trains on them"
        ) from error


def corpora_of(settings: BuildSettings, *, named_by: NamedBy) -> dict[str, Corpus]:
    """The texts of the sources by name; the output of the build isn't part of them."""
    outputs = (Path(settings.to).absolute(), hidden_folder(settings.to))
    return {
        name: open_corpus(
            source.corpus,
            on_corrupt=settings.on_corrupt,
            text_field=source.text_field or TEXT_FIELD,
            max_document_bytes=settings.max_document_bytes,
            options=source.corpus_options,
            outputs=outputs,
            setting=f"sources.{name}.corpus" if settings.sources else named_by,
            sources=settings.sources,
        )
        for name, source in sources_of(settings).items()
    }


def tokenizer_given(settings: BuildSettings) -> Tokenizer | None:
    """The tokenizer that the settings name; None if it is to be trained."""
    if bpe_size(settings):
        if settings.end_of_document is not None:
            raise DataError(
                f"end_of_document={settings.end_of_document!r} is for a tokenizer.json, not for "
                f"tokenizer={settings.tokenizer!r}; leave it out"
            )
        return None
    return tokenizer_named(settings.tokenizer, end_of_document=settings.end_of_document)


def build_entry(settings: BuildSettings) -> BuildEntry:
    return BuildEntry(
        sources={n: TextEntry(**asdict(source)) for n, source in sources_of(settings).items()},
        tokenizer=settings.tokenizer,
        end_of_document=settings.end_of_document,
        validation_fraction=settings.validation_fraction,
        shard_tokens=settings.shard_tokens,
        max_document_bytes=_unusual_longest(settings),
        on_corrupt=settings.on_corrupt,
    )


def _unusual_longest(settings: BuildSettings) -> int | None:
    """The length of the longest document, if it isn't the default.

    The default stands in no record: folders were built before there was this setting.
    """
    longest = settings.max_document_bytes
    return None if longest == LONGEST_DOCUMENT else longest


def build_demands(settings: BuildSettings, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What decides the bytes of a shard, and so whether a build can be resumed."""
    sources = sources_of(settings)
    longest = _unusual_longest(settings)
    return {
        **({} if longest is None else {"max_document_bytes": longest}),
        "format_version": FORMAT_VERSION,
        "sources": {name: source.corpus for name, source in sources.items()},
        "corpus_options": {name: source.corpus_options for name, source in sources.items()},
        "text_fields": {name: source.text_field for name, source in sources.items()},
        "tokenizer": settings.tokenizer,
        "fingerprint": None if tokenizer is None else tokenizer.fingerprint,
        "validation_fraction": settings.validation_fraction,
        "shard_tokens": settings.shard_tokens,
    }
