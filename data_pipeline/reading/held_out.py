"""Held-out text: which sequences of a source are validated on, and their text in bytes.

Owns the choice of sequences if not all are read, and counting their text in bytes. Leaves the
content of a sequence to `packing`, and arrays to `batches`.
"""

import hashlib
import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reading.batches import Batch, assembled, slots_of_rank
from data_pipeline.reading.packing import packed
from data_pipeline.settings import DataError, OnCorrupt, Packing
from data_pipeline.shards.reader import ShardFolder
from data_pipeline.tokenizers.tokenizer import Tokenizer

_Integers = NDArray[np.int64]

# How a token is decoded depends on some tokens before it, for example at the beginning of a text,
# and a character may consist of several tokens. Of byte tokens those are at most four.
_CONTEXT = 8

_logger = logging.getLogger(__name__)


class ValidationBatches:
    """The validation text of one source in stored order; each token is a target at most once.

    `batch_size` counts the sequences of a batch over all ranks. `num_batches` is the same for all
    ranks, even if the last batch doesn't fill them; it is 0 if the source has no validation text.

    `max_sequences` limits their number: they are evenly spread over the whole split, and the seed
    decides the first one. `bytes_per_token` is that of the split, or None if only part of it is
    read: then `num_bytes` counts.
    """

    def __init__(
        self,
        folder: ShardFolder,
        *,
        source: str,
        seq_len: int,
        batch_size: int,
        max_sequences: int | None = None,
        seed: int = 0,
        on_corrupt: OnCorrupt = OnCorrupt.fail,
    ) -> None:
        if seq_len < 1 or batch_size < 1:
            raise ValueError(f"{seq_len=} and {batch_size=} must be at least 1")
        self._documents = folder.documents("validation", source=source, on_corrupt=on_corrupt)
        self._starts = self._documents.starts
        self._sequences = packed(self._starts, seq_len=seq_len, packing=Packing.stream)
        there = self._sequences.num_sequences
        self.num_sequences = there if max_sequences is None else min(there, max_sequences)
        self.num_batches = -(-self.num_sequences // batch_size)
        self._chosen = _spread(there, self.num_sequences, seed=seed, source=source)
        self._mean_bytes: float = folder.num_bytes("validation", source=source) / max(
            1, self._documents.num_tokens
        )
        self.bytes_per_token = self._mean_bytes if self.num_sequences == there else None
        self._source = folder.sources.index(source)
        self._end_of_document = folder.tokenizer.end_of_document
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._load_tokenizer: Callable[[], Tokenizer] = folder.load_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._counted: dict[tuple[int, int, int], int] = {}

    def read(self, batch_number: int, *, rank: int, num_ranks: int) -> Batch:
        """Rank's contiguous slice of a batch; slots after the last sequence are all padding.

        Arrays have batch_size / num_ranks sequences. Raises ValueError if that isn't an integer,
        and for a rank outside range(num_ranks). Raises DataError for a document that isn't what was
        written, unless such documents are skipped.
        """
        slots = slots_of_rank(self._batch_size, rank=rank, num_ranks=num_ranks)
        positions = self._slice(batch_number, slots)
        return assembled(
            [(np.arange(len(positions)), self._documents, self._sequences.pieces(positions))],
            sources=np.full(len(slots), self._source, dtype=np.int64),
            seq_len=self._seq_len,
            padding=self._end_of_document,
        )

    def num_bytes(self, batch_number: int, *, rank: int, num_ranks: int) -> int:
        """The bytes of UTF-8 text of the targets that `read` returns, each counted once.

        A character is counted at its last token. If the tokenizer isn't available here, which a
        warning reports, it is the number of tokens times the split's mean.
        """
        key = (batch_number, rank, num_ranks)
        if key not in self._counted:
            slots = slots_of_rank(self._batch_size, rank=rank, num_ranks=num_ranks)
            pieces = self._sequences.pieces(self._slice(batch_number, slots))
            corrupt = pieces.rows[~self._documents.whole(pieces.documents)]
            kept = ~np.isin(pieces.rows, corrupt)
            self._counted[key] = self._count(
                pieces.documents[kept], pieces.offsets[kept], pieces.lengths[kept]
            )
        return self._counted[key]

    def _slice(self, batch_number: int, slots: range) -> _Integers:
        first = batch_number * self._batch_size
        positions: _Integers = self._chosen[first + slots.start : first + slots.stop]
        return positions

    def _count(self, documents: _Integers, offsets: _Integers, lengths: _Integers) -> int:
        try:
            self._tokenizer = self._tokenizer or self._load_tokenizer()
        except (DataError, ImportError) as error:
            _logger.warning("bits per byte take the mean bytes a token of the split: %s", error)
            return round(self._mean_bytes * int(lengths.sum()))
        sizes = self._starts[documents + 1] - self._starts[documents]
        firsts = np.maximum(offsets - _CONTEXT, 0)
        lasts = np.minimum(offsets + lengths + _CONTEXT, sizes)
        places = np.cumsum(lasts - firsts) - (lasts - firsts)
        tokens = np.empty(int((lasts - firsts).sum()), self._documents.dtype)
        self._documents.read(documents, firsts, lasts - firsts, out=tokens, places=places)
        total = 0
        for place, first, last, begin, length in zip(
            *(a.tolist() for a in (places, firsts, lasts, offsets, lengths)), strict=True
        ):
            around = tokens[place : place + last - first]
            total += text_bytes(
                self._tokenizer, around, begin=begin - first, end=begin - first + length
            )
        return total


def text_bytes(tokenizer: Tokenizer, tokens: NDArray[np.integer], *, begin: int, end: int) -> int:
    """UTF-8 bytes of the text of tokens begin … end - 1; a character counts at its last token."""
    whole = _utf8(tokenizer, tokens)
    before = _common(_utf8(tokenizer, tokens[:begin]), whole) if begin else 0
    upto = _common(_utf8(tokenizer, tokens[:end]), whole) if end < len(tokens) else len(whole)
    return upto - before


def _utf8(tokenizer: Tokenizer, tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
    return np.frombuffer(tokenizer.decode(tokens).encode("utf-8", "replace"), np.uint8)


def _common(some: NDArray[np.uint8], whole: NDArray[np.uint8]) -> int:
    """The length in bytes of the common beginning of two texts.

    They differ where a character is cut: its incomplete bytes decode to a character of their own.
    """
    size = min(len(some), len(whole))
    differing = np.flatnonzero(some[:size] != whole[:size])
    return int(differing[0]) if len(differing) else size


def _spread(there: int, wanted: int, *, seed: int, source: str) -> _Integers:
    """`wanted` of the positions of `there` sequences, evenly spread; the seed decides the first."""
    if wanted == there:
        return np.arange(there)
    digest = hashlib.blake2b(f"{seed}:validation:{source}".encode(), digest_size=8).digest()
    first = int.from_bytes(digest, "little") % there
    return (np.arange(wanted) * there + first) // wanted
