"""The shards that a run's settings name: opened if they exist, else built.

Owns the meaning of `data.dir` and `data.corpus`, and where in the cache the shards of a text are.
Leaves building to `builder`, and whether a text has changed to `text_record`.

    data.cache.dir/built/NAME-KEY/1/     shards of the text in its first version
                                  2/     and after it changed

KEY is a hash of everything except the text itself that decides the content of shards. Shards of
earlier versions are kept: a run that began with them resumes with them.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipeline.building.builder import build_shards
from data_pipeline.building.existing import (
    NamedBy,
    build_demands,
    corpora_of,
    differing_setting,
    existing_shards,
    tokenizer_given,
)
from data_pipeline.building.text_record import read_text_record, text_change
from data_pipeline.corpora.corpus import Corpus
from data_pipeline.corpora.corpus_files import is_text
from data_pipeline.corpora.raw_documents import reading_report
from data_pipeline.progress import tell
from data_pipeline.settings import (
    BuildSettings,
    DataError,
    DataSettings,
    resolved_dir,
    source_name,
)
from data_pipeline.shards.reader import ShardFolder
from data_pipeline.shards.unfinished import hidden_folder
from data_pipeline.storage import cache_folder
from data_pipeline.tokenizers.named import resolved_tokenizer


@dataclass(frozen=True, kw_only=True)
class PlannedBuild:
    """Shards that a run needs and that must be built first."""

    settings: BuildSettings
    named_by: NamedBy
    corpus: Corpus
    change: str | None = None
    """How the text differs from that of the newest shards; None if there are none."""

    def build(self, *, progress: bool = True) -> ShardFolder:
        """Builds them; raises DataError for a text that can't be read."""
        if self.named_by is NamedBy.data_dir:
            if self.change:
                tell(f"the text has changed: {self.change}", shown=progress)
            text, folder = self.settings.corpus, self.settings.to
            tell(f"building the shards of {text} in {folder}", shown=progress)
        shards = build_shards(self.settings, progress=progress, named_by=self.named_by)
        for source in shards.index.sources:
            if any(source.num_left_out.values()) or source.unknown_endings:
                tell(f"{source.name}: {reading_report(asdict(source))}", shown=progress)
        return shards


def builds_shards(data: DataSettings) -> bool:
    """Whether the settings name a text, whose shards are built if they are missing."""
    return data.dir is None or is_text(data.dir)  # no file or folder has the name of a URL


def open_folder(data: DataSettings) -> ShardFolder:
    """The shards in the settings' folder; raises DataError if there are none."""
    return ShardFolder.open(resolved_dir(data), on_corrupt=data.on_corrupt, cache=data.cache)


def open_or_build(data: DataSettings, *, progress: bool = True) -> ShardFolder:
    """The shards to train on, built first if they are missing and the settings name a text.

    Raises DataError if `data.dir` is neither shards nor text, and for a text that can't be read.
    """
    found = opened_or_planned(data, progress=progress)
    return found if isinstance(found, ShardFolder) else found.build(progress=progress)


def opened_or_planned(data: DataSettings, *, progress: bool = False) -> ShardFolder | PlannedBuild:
    """The shards to train on, or the build that `open_or_build` would make of a text."""
    if data.dir is not None:
        return _of_text(data, progress=progress) if is_text(data.dir) else open_folder(data)
    build = BuildSettings(
        corpus=data.corpus,
        corpus_options=data.corpus_options,
        text_field=data.text_field,
        tokenizer=data.tokenizer,
        to=resolved_dir(data),
        on_corrupt=data.on_corrupt,
        on_changed=data.on_changed,
    )
    named_by = NamedBy.data_corpus
    existing = existing_shards(build, progress=progress, named_by=named_by)
    if existing is not None and not hidden_folder(build.to).exists():
        return existing
    (corpus,) = corpora_of(build, named_by=named_by).values()
    return PlannedBuild(settings=build, named_by=named_by, corpus=corpus)


def _of_text(data: DataSettings, *, progress: bool) -> ShardFolder | PlannedBuild:
    """The shards in the cache of the text as it is now, or the build of them."""
    assert data.dir is not None
    built = cache_folder(data.cache) / "built"
    build = BuildSettings(
        corpus=str(Path(data.dir).absolute()),
        text_field=data.text_field,
        tokenizer=resolved_tokenizer(data.tokenizer),
        to=str(built),
        on_corrupt=data.on_corrupt,
    )
    key = hashlib.sha256(json.dumps(build_demands(build, tokenizer_given(build))).encode())
    name = f"{source_name(str(build.corpus))}-{key.hexdigest()[:12]}"
    folder = built / name
    build = replace(build, to=str(folder / "1"))
    corpora = corpora_of(build, named_by=NamedBy.data_dir)
    numbers, change = _numbers(folder), None
    for number in numbers:
        place = folder / str(number)
        try:
            shards = ShardFolder.open(place, on_corrupt=data.on_corrupt)
            before = read_text_record(place, sources=corpora)
        except DataError as error:
            tell(f"passing over {place}: {error}", shown=progress)
            continue
        if before is None or differing_setting(build, shards.index):
            continue
        found = text_change(place, before, corpora, progress=progress)
        if found is None:
            tell(f"the shards of {data.dir} are in {place}; nothing to build", shown=progress)
            return shards
        change = change or found
    (corpus,) = corpora.values()
    return PlannedBuild(
        settings=replace(build, to=str(folder / str(max(numbers, default=0) + 1))),
        named_by=NamedBy.data_dir,
        corpus=corpus,
        change=change,
    )


def _numbers(folder: Path) -> list[int]:
    """The numbers of the shard folders in the cache's folder of a text, newest first."""
    names: Iterator[str] = iter(())
    with suppress(OSError):  # none yet; if it can't be created, the build reports it
        names = iter(os.listdir(folder))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)
