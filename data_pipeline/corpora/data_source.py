"""Data sources of extensions: documents from anywhere, as a corpus that a build reads."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.corpora.corpus_files import CorpusFile
from data_pipeline.corpora.raw_documents import RawDocument, Text
from data_pipeline.extensions import Registry

DATA_SOURCES = Registry[Any]("data source", setting="corpus", built_in={})


class DataSource(ABC):
    """Documents that aren't text files, such as those of a database or a format of one's own."""

    num_bytes = 0
    """Roughly how many bytes of text it holds, for the progress bar; 0 if unknown."""

    def __init__(self, options: Any = None) -> None:
        self.options = options
        """Its own settings: an object of the dataclass it is registered with."""

    @abstractmethod
    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields each document: its location, for messages, and its text.

        Always the same documents in the same order. DataError ends the build with its message.
        """

    @abstractmethod
    def version(self) -> str:
        """Identifies the text: shards are rebuilt if it differs from the one they were built with.

        For example a number, a date or a hash.
        """


@dataclass(frozen=True)
class SourceCorpus:
    """A data source as a corpus."""

    name: str
    source: DataSource
    options: Mapping[str, Any]

    @property
    def description(self) -> str:
        """Its name and options."""
        given = f" {json.dumps(dict(self.options))}" if self.options else ""
        return f"data source {self.name}{given}"

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """What replaces its files in the record of what shards were built from."""
        version = f"{self.description}, version {self.source.version()}"
        return (CorpusFile(name=version, size=0, mtime_ns=0),)

    @property
    def num_bytes(self) -> int:
        """Roughly how many bytes of text it holds."""
        return self.source.num_bytes

    def parts(self, part_bytes: int) -> "list[SourceCorpus]":
        """Only itself: nothing is known of what it reads."""
        return [self]

    @property
    def state(self) -> str:
        """Its version."""
        return repr(self.files)

    @property
    def begins_inside(self) -> bool:
        """It has no lines."""
        return False

    def num_lines(self, *, before: bool = False) -> int:
        """It has no lines."""
        return 0

    def after_lines(self, num_lines: int) -> "SourceCorpus":
        """Itself."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # What a user's class holds, such as a connection, can't be sent to another process.
        return open_data_source, (self.name, dict(self.options))

    def raw_documents(self) -> Iterator[RawDocument]:
        """Yields each document's text."""
        for where, text in self.source.documents():
            yield Text(where=where, text=text)


def open_data_source(name: str, options: Mapping[str, Any]) -> SourceCorpus:
    """Returns the corpus of a registered data source; ValueError for invalid options."""
    checked = DATA_SOURCES.checked_options(name, options)
    source: DataSource = DATA_SOURCES.get(name).made(DATA_SOURCES.typed_options(name, checked))
    return SourceCorpus(name, source, checked)
