"""What a user may say about data, and the error for what was said wrong.

Owns the settings' names, types, defaults and bounds. Leaves their meaning to the files that use
them, and the reading of command lines to `command`. The types are those that
`OmegaConf.structured` digests, so that Hydra can use the classes as schemas.
"""

import os
import re
from dataclasses import field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0.0)]


def home_folder() -> Path | None:
    """The user's home; None where HOME isn't set and the passwd file has no entry for the user."""
    home = os.path.expanduser("~")
    # What has no home comes back as it was; an empty HOME would be the root.
    return None if home == "~" or os.environ.get("HOME") == "" else Path(home)


def _path_text(text: str) -> str:
    """A path with a leading `~` or `~user` expanded; refused where it is empty, or nobody's."""
    if not text.strip():
        raise ValueError(
            "is empty, as from a shell's variable that isn't set: give a path (. is the folder "
            "that the command runs in)"
        )
    if not text.startswith("~"):
        return text
    user = text.partition("/")[0].removeprefix("~")
    expanded = os.path.expanduser(text)
    if expanded == text or (not user and home_folder() is None):
        why = f"there is no user {user!r}" if user else "HOME isn't set"
        raise ValueError(f"{why}, so that ~{user} means no folder: write the path out, or ./{text}")
    return expanded


# A setting that is a path, or may be one beside a name or an address. For every such setting of
# every command: an empty path would mean the working directory, and `~` a folder of that name.
PathText = Annotated[str, AfterValidator(_path_text)]


def _field_name(text: str) -> str:
    if not text.strip():
        raise ValueError(
            "is empty: name the field of JSON objects, or column of tables, that holds the text"
        )
    return text


# Where the text of a document is in JSON and tables: a field or column, a.b for an inner one.
TextField = Annotated[str, AfterValidator(_field_name)]
TEXT_FIELD = "text"

# What goes into file names and metric names.
SOURCE_NAME = r"^[A-Za-z0-9_-]{1,40}$"

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
# A licence `1.0` or a source `12` is a number to Hydra, and a name to whoever wrote it.
_NAMES = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class DataError(ValueError):
    """Data, or a setting about data, that can't be used; the message names it and a way out."""


class UnavailableError(OSError):
    """Data that can't be had just now, of which nothing says that it is damaged: never skipped."""


class OnCorrupt(StrEnum):
    """What to do with data that isn't what it should be: end, or count it and continue without."""

    fail = "fail"
    skip = "skip"


class OnChanged(StrEnum):
    """What to do where shards are there, and their text has changed: end, or build them anew."""

    fail = "fail"
    rebuild = "rebuild"


class Packing(StrEnum):
    """How documents become sequences: cut from one long stream, or packed with few cuts."""

    stream = "stream"
    best_fit = "best_fit"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StageSettings:
    """Other weights from a step on, as for annealing on better text at the end of a run."""

    from_step: Count
    weights: dict[str, float]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CacheSettings:
    """How shards come from a remote folder, and where they are kept meanwhile.

    `dir` is a folder on a local disk; none given: `~/.cache/moetrain/shards`. What is downloaded
    is kept under `max_gib`; `built` in it has the shards of text that `data.dir` names. A file
    that can't be downloaded, or of which nothing comes for `timeout_seconds`, is tried again
    `num_retries` times, after random pauses of at most `pause_seconds`, then twice as long each
    time, up to a minute.
    """

    dir: PathText | None = None
    max_gib: Positive = 50.0
    timeout_seconds: Positive = 60.0
    num_retries: Natural = 5
    pause_seconds: Positive = 1.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataSettings:
    """The `data.*` part of the training configuration.

    `dir` is a folder of shards that exists, here or at a URL; or text, a file or folder here,
    whose shards are built once into the cache. Without it the shards of `corpus` are taken from
    `data/` in the working directory, and built there when missing; `on_changed` says what becomes
    of those whose text has changed since. Either is built with `tokenizer`, from the `text_field`
    of JSON and tables.

    Several sources are mixed by `weights`, by `epochs` of each, or by their sizes to the power of
    1 / `temperature` (1: in proportion; larger: more even); `stages` change the weights later.
    None takes back what a file says of a source.
    A source that would be read more than `max_epochs` times ends the command before it starts.

    `mask_documents` keeps attention inside a document. `shuffle_window` counts shards among which
    sequences are mixed at a time; none given: a whole epoch. `num_workers` threads read
    `prefetch_batches` global batches ahead.
    """

    dir: PathText | None = None
    corpus: PathText = "stdlib"
    corpus_options: dict[str, Any] = field(default_factory=dict)
    text_field: TextField = TEXT_FIELD
    tokenizer: PathText = "bytes"
    weights: dict[str, float | None] = field(default_factory=dict)
    epochs: dict[str, float | None] = field(default_factory=dict)
    temperature: Positive = 1.0
    stages: list[StageSettings] = field(default_factory=list)
    max_epochs: Positive | None = None
    packing: Packing = Packing.stream
    mask_documents: bool = False
    shuffle_window: Count | None = None
    on_corrupt: OnCorrupt = OnCorrupt.fail
    on_changed: OnChanged = OnChanged.fail
    num_workers: Natural = 1
    prefetch_batches: Count = 2
    cache: CacheSettings = field(default_factory=CacheSettings)


@dataclass(frozen=True, kw_only=True, config=_NAMES)
class SourceSettings:
    """One source of a build: where its text is, and what the index says of it.

    `text_field` is the field of JSON and tables; none given: the build's. `corpus_options` are the
    settings of a data source of an extension.
    """

    corpus: PathText
    corpus_options: dict[str, Any] = field(default_factory=dict)
    text_field: TextField | None = None
    language: str | None = None
    licence: str | None = None


@dataclass(frozen=True, kw_only=True, config=_NAMES)
class BuildSettings:
    """The settings of `python -m data_pipeline.build`.

    Either `corpus` is the only source, described by `name`, `language` and `licence`, or
    `sources` has several by name. `text_field` names the field of JSON objects, or the column of
    tables, that holds the text, `a.b` one inside another. `to` is the folder to make. `tokenizer`
    is a name, the path of a `tokenizer.json`, or `bpe:N` (N ids, trained on the text itself);
    `end_of_document` names the token of a `tokenizer.json` that ends a document.
    `validation_fraction` is the share of documents held out, `shard_tokens` the number of tokens
    at which a shard is full. `num_processes` tokenise; none given: as many
    as there are cores, where the tokenizer is slow enough to need them. `on_corrupt` says what
    becomes of input that can't be read, `on_changed` what becomes of shards that are there and
    whose text isn't what it was. `extensions` are modules of the user's own, which may register
    tokenizers and data sources; `corpus_options` are such a source's settings.
    """

    to: PathText
    tokenizer: PathText
    corpus: PathText | None = None
    corpus_options: dict[str, Any] = field(default_factory=dict)
    text_field: TextField = TEXT_FIELD
    name: str | None = None
    language: str | None = None
    licence: str | None = None
    sources: dict[str, SourceSettings] = field(default_factory=dict)
    end_of_document: str | None = None
    validation_fraction: Fraction = 0.05
    shard_tokens: Count = 2**24
    num_processes: Count | None = None
    on_corrupt: OnCorrupt = OnCorrupt.fail
    on_changed: OnChanged = OnChanged.fail
    extensions: list[str] = field(default_factory=list)


def sources_of(settings: BuildSettings) -> dict[str, SourceSettings]:
    """The sources of a build by name, in the order given.

    Each has a `text_field`, the build's where it has none of its own.

    Raises DataError where there is none, where both `corpus` and `sources` are given, and for a
    name that can't stand in file names.
    """
    only = {key: getattr(settings, key) for key in ("corpus", "name", "language", "licence")}
    given = [f"{key}={value!r}" for key, value in only.items() if value is not None]
    if settings.sources:
        if given:
            raise DataError(
                f"{given[0]} describes a build's only source, and there are sources "
                f"{', '.join(settings.sources)}; give it as sources.NAME.… or leave it out"
            )
        sources = settings.sources
    elif settings.corpus is None:
        raise DataError(
            "there is no text to build from: add corpus=… for one source, or "
            "sources.NAME.corpus=… for each of several"
        )
    else:
        name = source_name(settings.corpus) if settings.name is None else settings.name
        source = SourceSettings(
            corpus=settings.corpus,
            corpus_options=settings.corpus_options,
            language=settings.language,
            licence=settings.licence,
        )
        sources = {name: source}
    for name in sources:
        if not re.fullmatch(SOURCE_NAME, name):
            raise DataError(
                f"name={name!r} goes into file names and metric names: give up to 40 letters "
                "from a to z, digits, - and _"
            )
    return {
        name: replace(source, text_field=source.text_field or settings.text_field)
        for name, source in sources.items()
    }


def resolved_dir(settings: DataSettings) -> str:
    """The absolute path of the shards or text that the settings mean, there or not; or its URL."""
    if settings.dir is not None:
        is_path = "://" not in settings.dir and not settings.dir.startswith("pipe:")
        return str(Path(settings.dir).absolute()) if is_path else settings.dir
    parts = [source_name(settings.corpus), _plain_name(settings.tokenizer)]
    if settings.text_field != TEXT_FIELD:
        parts.insert(1, _plain_name(settings.text_field))
    return str(Path("data", "-".join(parts)).absolute())


def source_name(corpus: str) -> str:
    """A name for a corpus that is safe in file names and metric names: `My Text.jsonl` → `My-Text`.

    Raises DataError where nothing of the corpus's own name is left.
    """
    name = plain_source_name(corpus)
    if not name:
        raise DataError(f"corpus={corpus!r} gives no name for its source; give one with name=NAME")
    return name


def plain_source_name(corpus: str) -> str:
    """What of a corpus's name is safe in file names and metric names, which may be nothing."""
    packings = "tar|tgz|txz|tbz2?|tzst|gz|gzip|xz|bz2|bzip2|zst|zstd"
    endings = rf"(\.(jsonl|ndjson|json|txt|md|x?html?|parquet|arrow|feather|{packings}))+$"
    stem = re.sub(endings, "", Path(corpus).absolute().name)
    return _plain_name(stem)[:40]


def _plain_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")
