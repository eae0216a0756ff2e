"""The settings about data, and the error for invalid data or settings.

Owns the settings' names, types, defaults and bounds. Leaves their meaning to the files that use
them, and reading command lines to `command`. The types are those that `OmegaConf.structured`
accepts, so that Hydra can use the classes as schemas.
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
    """The user's home; None if HOME isn't set and the passwd file has no entry for the user."""
    home = os.path.expanduser("~")
    # Without a home folder, `~` is returned unchanged; an empty HOME would be the root folder.
    return None if home == "~" or os.environ.get("HOME") == "" else Path(home)


def _path_text(text: str) -> str:
    """A path with a leading `~` or `~user` expanded; raises if it is empty or has no such user."""
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


# A setting that is a path, or may be one instead of a name or an address. Used for every such
# setting of every command: an empty path would mean the working directory, and `~` a folder of that
# name.
PathText = Annotated[str, AfterValidator(_path_text)]


def _field_name(text: str) -> str:
    if not text.strip():
        raise ValueError(
            "is empty: name the field of JSON objects, or column of tables, that holds the text"
        )
    return text


# The text of a document in JSON and tables: a field or column, a.b for a nested one.
TextField = Annotated[str, AfterValidator(_field_name)]
TEXT_FIELD = "text"

# In bytes of text. While it is built, a document takes up to eight times as much memory.
LONGEST_DOCUMENT = 2**30

# Valid in file names and metric names.
SOURCE_NAME = r"^[A-Za-z0-9_-]{1,40}$"

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
# To Hydra, a licence `1.0` or a source `12` is a number; the user meant a name.
_NAMES = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class DataError(ValueError):
    """Data, or a setting about data, that can't be used; the message names it and a solution."""


class UnavailableError(OSError):
    """Data that is unavailable at the moment, with no sign that it is damaged: never skipped."""


class OnCorrupt(StrEnum):
    """What to do with corrupt data: fail, or count it and continue without it."""

    fail = "fail"
    skip = "skip"


class OnChanged(StrEnum):
    """What to do if shards exist and their text has changed: fail, or rebuild them."""

    fail = "fail"
    rebuild = "rebuild"


class BuildOn(StrEnum):
    """Where a large text is built: by processes of this machine, or by tasks of a Ray cluster."""

    local = "local"
    ray = "ray"


class Packing(StrEnum):
    """How documents become sequences: cut from one long stream, or packed with few cuts."""

    stream = "stream"
    best_fit = "best_fit"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StageSettings:
    """Different weights from a step on, as for annealing on better text at the end of a run."""

    from_step: Count
    weights: dict[str, float]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CacheSettings:
    """How shards are downloaded from a remote folder, and where they are cached.

    `dir` is a folder on a local disk; default: `~/.cache/moetrain/shards`. Downloads are kept below
    `max_gib` in total; its subfolder `built` has the shards of text that `data.dir` names. If a
    download fails, or stalls for `timeout_seconds`, it is retried `num_retries` times. The pauses
    before are random, at most `pause_seconds` at first, then twice as long each time, up to a
    minute.
    """

    dir: PathText | None = None
    max_gib: Positive = 50.0
    timeout_seconds: Positive = 60.0
    num_retries: Natural = 5
    pause_seconds: Positive = 1.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataSettings:
    """The `data.*` part of the training configuration.

    `dir` is an existing folder of shards, local or at a URL; or text, a local file or folder, whose
    shards are built once into the cache. Without it the shards of `corpus` are read from `data/` in
    the working directory, and built there if missing; `on_changed` says what happens if their text
    has changed since. Both are built with `tokenizer`, from the `text_field` of JSON and tables.

    Several sources are mixed by `weights`, by `epochs` of each, or by their sizes to the power of
    1 / `temperature` (1: proportional; larger: more even); `stages` change the weights later. A
    value of None cancels what a file sets for a source. If a source would be read more than
    `max_epochs` times, the command fails before it starts.

    `mask_documents` restricts attention to within a document. `shuffle_window` is the number of
    shards among which sequences are mixed at a time; default: a whole epoch. `num_workers` threads
    read `prefetch_batches` global batches ahead.
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
    """One source of a build: where its text is, and how the index describes it.

    `text_field` is the field of JSON and tables; default: the build's. `corpus_options` are the
    settings of an extension's data source.
    """

    corpus: PathText
    corpus_options: dict[str, Any] = field(default_factory=dict)
    text_field: TextField | None = None
    language: str | None = None
    licence: str | None = None


@dataclass(frozen=True, kw_only=True, config=_NAMES)
class BuildSettings:
    """The settings of `python -m data_pipeline.build`.

    Either `corpus` is the only source, described by `name`, `language` and `licence`, or `sources`
    has several by name. `text_field` names the field of JSON objects, or the column of tables, that
    holds the text; `a.b` is a nested one. `to` is the folder to create. `tokenizer` is a name, the
    path of a `tokenizer.json`, or `bpe:N` (N ids, trained on the text itself); `end_of_document`
    names the token of a `tokenizer.json` that ends a document. `validation_fraction` is the share
    of documents held out, `shard_tokens` the number of tokens at which a shard is full.
    `num_processes` work: in a large text each builds parts of its own, in a smaller one they
    tokenise; default: one per core, or none in a small text if the tokenizer is fast. With
    `on=ray` the parts of a large text are built by tasks of the Ray cluster at `ray_address`, at
    most `num_processes` at a time; default: on all of its cores.
    `max_document_bytes` is the longest document: a longer one is corrupt.
    `on_corrupt` says what happens to unreadable input, `on_changed` what happens to existing shards
    whose text has changed. `extensions` are the user's own modules, which may register tokenizers
    and data sources; `corpus_options` are such a source's settings.
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
    max_document_bytes: Count = LONGEST_DOCUMENT
    num_processes: Count | None = None
    on: BuildOn = BuildOn.local
    ray_address: str | None = None
    on_corrupt: OnCorrupt = OnCorrupt.fail
    on_changed: OnChanged = OnChanged.fail
    extensions: list[str] = field(default_factory=list)


def sources_of(settings: BuildSettings) -> dict[str, SourceSettings]:
    """The sources of a build by name, in the order given.

    Each has a `text_field`, by default the build's.

    Raises DataError if there is none, if both `corpus` and `sources` are given, and for a name that
    is invalid in file names.
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
    """The absolute path, or the URL, of the settings' shards or text, existing or not."""
    if settings.dir is not None:
        is_path = "://" not in settings.dir and not settings.dir.startswith("pipe:")
        return str(Path(settings.dir).absolute()) if is_path else settings.dir
    parts = [source_name(settings.corpus), _plain_name(settings.tokenizer)]
    if settings.text_field != TEXT_FIELD:
        parts.insert(1, _plain_name(settings.text_field))
    return str(Path("data", "-".join(parts)).absolute())


def source_name(corpus: str) -> str:
    """A name for a corpus that is safe in file names and metric names: `My Text.jsonl` → `My-Text`.

    Raises DataError if nothing of the corpus's own name is left.
    """
    name = plain_source_name(corpus)
    if not name:
        raise DataError(f"corpus={corpus!r} gives no name for its source; give one with name=NAME")
    return name


def plain_source_name(corpus: str) -> str:
    """The part of a corpus's name that is safe in file names and metric names, possibly empty."""
    packings = "tar|tgz|txz|tbz2?|tzst|gz|gzip|xz|bz2|bzip2|zst|zstd"
    endings = rf"(\.(jsonl|ndjson|json|txt|md|x?html?|parquet|arrow|feather|{packings}))+$"
    stem = re.sub(endings, "", Path(corpus).absolute().name)
    return _plain_name(stem)[:40]


def _plain_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")
