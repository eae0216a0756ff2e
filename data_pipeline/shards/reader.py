"""Reading a shard folder: its index, checked against its files.

Owns opening. Leaves the tokens of documents to `documents`, which documents make a sequence to
`packing`, the order of sequences to `order` and assembling batches to `batches`.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from data_pipeline.settings import CacheSettings, DataError, OnCorrupt
from data_pipeline.shards.documents import Documents
from data_pipeline.shards.index import (
    Baselines,
    Index,
    SourceEntry,
    SplitEntry,
    read_index,
    shards_of,
    table_size,
)
from data_pipeline.shards.maps import ShardMaps, num_mappable
from data_pipeline.shards.node_arrays import NodeArrays
from data_pipeline.storage import ShardFiles, open_files
from data_pipeline.tokenizers.named import tokenizer_from
from data_pipeline.tokenizers.tokenizer import Tokenizer, TokenizerEntry, token_dtype

# How many shards one call to read holds open at a time, if the process may have many open.
_SHARDS_AT_ONCE = 256


class ShardFolder:
    """A complete folder of shards, opened by `ShardFolder.open`.

    `damaged` says, for each shard that was found missing or truncated, what is wrong with it.
    """

    def __init__(
        self,
        index: Index,
        files: ShardFiles,
        *,
        damaged: Mapping[str, str],
        cache: CacheSettings | None = None,
    ) -> None:
        self.index = index
        self.damaged = damaged
        self._files = files
        self._cache = cache or CacheSettings()
        self._num_shards = len(shards_of(index))
        self._num_mappable = num_mappable(self._num_shards)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        on_corrupt: OnCorrupt = OnCorrupt.fail,
        cache: CacheSettings | None = None,
    ) -> Self:
        """Opens a local folder or a URL: reads its index and checks that each file exists.

        Local files must have their full size; remote files are checked when they are downloaded.

        Raises DataError naming the folder or file that is wrong. If damaged shards are to be
        skipped, they are recorded in `damaged` instead.
        """
        files, damaged = open_files(str(path), cache=cache or CacheSettings()), dict[str, str]()
        index = read_index(files)
        folder = cls(index, files, damaged=damaged, cache=cache)
        for shard in shards_of(index):
            files.check(shard.documents, size=table_size(shard))
            try:
                files.check(shard.file, size=shard.size)
            except DataError as error:
                if on_corrupt is OnCorrupt.fail:
                    raise
                damaged[shard.file] = str(error)
        return folder

    @property
    def location(self) -> str:
        """The folder's absolute path or its URL, without secrets, for people."""
        return self._files.location

    @property
    def path(self) -> Path:
        """The path of the folder, if it is on a disk of this machine."""
        return Path(self.location)

    @property
    def fingerprint(self) -> str:
        """One hash of the tokenizer and of every shard in order; identifies the folder's tokens."""
        hashes = [self.tokenizer.fingerprint, *(shard.sha256 for shard in shards_of(self.index))]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    @property
    def tokenizer(self) -> TokenizerEntry:
        """Name, vocabulary size, end of document and fingerprint of the tokens' tokenizer."""
        return self.index.tokenizer

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer itself, from the folder's own copy if it has one.

        Raises DataError if it isn't the one that made the tokens.
        """
        entry = self.tokenizer
        definition = None if entry.file is None else self._files.read_bytes(entry.file)
        return tokenizer_from(entry, definition=definition)

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources, in stored order."""
        return tuple(source.name for source in self.index.sources)

    @property
    def baselines(self) -> dict[str, Baselines]:
        """For each source, what a byte-bigram model and zlib reach on its validation text."""
        return {source.name: source.baselines for source in self.index.sources}

    def source(self, name: str) -> SourceEntry:
        """The index's entry of a source; raises DataError if there is no source of that name."""
        for source in self.index.sources:
            if source.name == name:
                return source
        raise DataError(
            f"source {name!r} is not in {self.location}; there are {', '.join(self.sources)}"
        )

    def num_tokens(self, split: str, *, source: str | None = None) -> int:
        """Tokens of a split, ends of documents included, of one source or of all."""
        return sum(entry.num_tokens for entry in self._splits(split, source))

    def num_bytes(self, split: str, *, source: str | None = None) -> int:
        """Bytes of UTF-8 text of a split, of one source or of all."""
        return sum(entry.num_bytes for entry in self._splits(split, source))

    def documents(
        self, split: str, *, source: str, on_corrupt: OnCorrupt = OnCorrupt.fail
    ) -> Documents:
        """The documents of a split of a source."""
        (entry,) = self._splits(split, source)
        # The shards of all sources and splits may be open together.
        share = self._num_mappable * len(entry.shards) // max(1, self._num_shards)
        maps = ShardMaps(
            self._files,
            most=self._files.max_mapped or max(1, share),
            at_once=min(_SHARDS_AT_ONCE, max(1, self._num_mappable // 4)),
        )
        return Documents(
            entry.shards,
            files=self._files,
            maps=maps,
            dtype=token_dtype(self.tokenizer.vocab_size),
            on_corrupt=on_corrupt,
            damaged=self.damaged,
            node=NodeArrays(cache=self._cache),
        )

    def _splits(self, split: str, source: str | None) -> list[SplitEntry]:
        sources = self.index.sources if source is None else (self.source(source),)
        if split not in sources[0].splits:
            raise DataError(f"split {split!r} is none of {', '.join(sources[0].splits)}")
        return [entry.splits[split] for entry in sources]
