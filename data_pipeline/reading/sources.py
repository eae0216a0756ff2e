"""Sources: what their sequences are made of, tokens on a disk or text that is tokenised now.

Owns opening a source for training as its settings say. Leaves the mixing of sources and arrays of
batches to `batches`.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.building.encoding import Encoder
from data_pipeline.reading.order import Order
from data_pipeline.reading.packing import PackedDocuments, PackingReport, Pieces, packed
from data_pipeline.reading.text import RankPlace, TextSequences
from data_pipeline.settings import DataError, DataSettings, OnCorrupt, Packing
from data_pipeline.shards.reader import Documents, ShardFolder
from data_pipeline.tokenizers.tokenizer import Tokenizer

_Integers = NDArray[np.int64]


class ReadsDocuments(Protocol):
    """Documents of token ids, on a disk or in memory; as `reader.Documents`."""

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The type of the token ids."""
        ...

    def whole(self, documents: _Integers) -> NDArray[np.bool_]:
        """Which of the documents [n] are what was written."""
        ...

    def read(
        self,
        documents: _Integers,
        offsets: _Integers,
        lengths: _Integers,
        *,
        out: NDArray[np.unsignedinteger],
        places: _Integers,
    ) -> _Integers:
        """Copies pieces [n] to `places` of `out`; returns the token before each."""
        ...


class Source(Protocol):
    """A source of sequences, which are numbered in the order in which they are drawn."""

    @property
    def number(self) -> int:
        """Its place among the folder's sources."""
        ...

    @property
    def size(self) -> int:
        """Its sequences in an epoch; for text, whose tokens aren't counted yet, its bytes."""
        ...

    def pieces(self, numbers: _Integers, *, first: int, last: int) -> tuple[ReadsDocuments, Pieces]:
        """What stands in the sequences `numbers` [rows]; all ranks need some of first … last - 1.

        Raises DataError for a document that isn't what was written, unless such are skipped.
        """
        ...

    def report(self) -> PackingReport | None:
        """What packing came to; None for text."""
        ...

    def place(self, number: int) -> dict[str, int] | None:
        """What a checkpoint must hold to go on with sequence `number`, besides that number."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """A source whose documents are tokens."""

    number: int
    documents: Documents
    sequences: PackedDocuments
    order: Order

    @property
    def size(self) -> int:
        """Its sequences in an epoch."""
        return self.sequences.num_sequences

    def pieces(self, numbers: _Integers, *, first: int, last: int) -> tuple[ReadsDocuments, Pieces]:
        """What stands in the sequences `numbers` [rows]."""
        _, positions = self.order.at(numbers)
        return self.documents, self.sequences.pieces(positions)

    def report(self) -> PackingReport:
        """What packing came to."""
        return self.sequences.report()

    def place(self, number: int) -> None:
        """Nothing: a sequence's number says all."""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A source whose documents are text."""

    number: int
    documents: Documents
    sequences: TextSequences

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.documents.num_tokens

    def pieces(self, numbers: _Integers, *, first: int, last: int) -> tuple[ReadsDocuments, Pieces]:
        """What stands in the sequences `numbers` [rows] of first … last - 1."""
        return self.sequences.read(numbers, first=first, last=last)

    def report(self) -> None:
        """Nothing: its sequences aren't known before they are read."""

    def place(self, number: int) -> dict[str, int]:
        """Where sequence `number` begins."""
        return asdict(self.sequences.place(number))


class BackgroundEncoder:
    """An `Encoder` that starts its processes when the first document comes."""

    def __init__(self, tokenizer: Tokenizer, *, num_processes: int) -> None:
        self._make: Callable[[], Encoder] = lambda: Encoder(
            tokenizer, num_processes=num_processes if tokenizer.needs_processes else 0
        )
        self._encoder: Encoder | None = None
        self._lock = threading.Lock()

    def started(self) -> Encoder:
        """The encoder, its processes started."""
        with self._lock:
            self._encoder = self._encoder or self._make()
            return self._encoder

    def close(self) -> None:
        """Ends the processes, if they were started."""
        with self._lock:
            if self._encoder is not None:
                self._encoder.close()
            self._encoder = None


def open_source(
    folder: ShardFolder,
    name: str,
    *,
    seq_len: int,
    seed: int,
    data: DataSettings,
    encoder: BackgroundEncoder | None,
    place: Mapping[str, Any] | None,
) -> Source:
    """A source of the folder, to be trained on; `encoder` for a folder of text.

    Raises DataError where it has fewer tokens than one sequence needs, and for settings that need
    tokens where there is text.
    """
    documents = folder.documents("train", source=name, on_corrupt=data.on_corrupt)
    number = folder.sources.index(name)
    if documents.num_tokens < seq_len:
        others = "; or leave the source out, by naming the others in data.weights"
        raise DataError(
            f"the train split of {name!r} in {folder.location} has {documents.num_tokens} tokens, "
            f"fewer than one sequence of seq_len={seq_len}; use more text or shorter sequences"
            f"{others if len(folder.sources) > 1 else ''}"
        )
    if encoder is not None:
        _require_no_tokens(folder, data)
        order = _order(documents.num_documents, documents, name, seed=seed, data=data)
        sequences = TextSequences(
            documents,
            order=order,
            encoded=lambda texts: encoder.started().encoded(texts),
            seq_len=seq_len,
            start=RankPlace(**place) if place else RankPlace(),
        )
        return TextSource(number=number, documents=documents, sequences=sequences)
    packing = packed(documents.starts, seq_len=seq_len, packing=data.packing)
    order = _order(packing.num_sequences, documents, name, seed=seed, data=data)
    return TokenSource(number=number, documents=documents, sequences=packing, order=order)


def _order(
    num_samples: int, documents: Documents, name: str, *, seed: int, data: DataSettings
) -> Order:
    return Order(
        num_samples=num_samples,
        seed=seed,
        source=name,
        block_size=-(-num_samples // documents.num_shards),
        window=data.shuffle_window,
    )


def _require_no_tokens(folder: ShardFolder, data: DataSettings) -> None:
    """Raises DataError for a setting that wants to know how many tokens a text has."""
    for key, value, is_set in (
        ("packing", data.packing.value, data.packing is not Packing.stream),
        ("max_epochs", data.max_epochs, data.max_epochs is not None),
        # Without a document that one rank finds damaged, all after it would stand elsewhere there.
        ("on_corrupt", data.on_corrupt.value, data.on_corrupt is not OnCorrupt.fail),
    ):
        if is_set:
            raise DataError(
                f"data.{key}={value} can't be kept to with {folder.location}, which holds text: "
                "how many tokens its documents have isn't known before they are read; leave it "
                "out, or build shards with a tokenizer"
            )
