"""Held-out text: which sequences of a source are validated on, and the bytes that they stand for.

Owns the choice of sequences where not all are read, and the count of their text in bytes. Leaves
what stands in a sequence to `packing`, and arrays to `batches`.
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

# What a tokenizer makes of a token depends on some before it, as where a text begins, and a
# character may be several tokens. Of bytes those are four at most.
_CONTEXT = 8

_logger = logging.getLogger(__name__)


class ValidationBatches:
    """The validation text of one source in stored order, each token a target at most once.

    `batch_size` counts the sequences of a batch over all ranks. `num_batches` is the same for all
    ranks, whatever there is left for each; 0 where the source has no validation text.

    `max_sequences` takes as many, evenly spread over the whole split from a first one that the
    seed decides. `bytes_per_token` is that of the split, None where only part of it is read: then
    `num_bytes` counts.
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
        """Rank's contiguous slice of a batch; slots past the last sequence are all padding.

        Arrays have batch_size / num_ranks sequences. Raises ValueError where that isn't whole,
        and for a rank outside range(num_ranks); and DataError for a document that isn't what was
        written, unless such are skipped.
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
        """The bytes of UTF-8 text behind the targets that `read` gives; counted once.

        A character counts where its last token is. Where the tokenizer can't be had here, which
        a warning tells, it is the tokens times the mean of the split.
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
    """The bytes of UTF-8 text of tokens begin … end - 1; a character counts with its last token."""
    whole = _utf8(tokenizer, tokens)
    before = _common(_utf8(tokenizer, tokens[:begin]), whole) if begin else 0
    upto = _common(_utf8(tokenizer, tokens[:end]), whole) if end < len(tokens) else len(whole)
    return upto - before


def _utf8(tokenizer: Tokenizer, tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
    return np.frombuffer(tokenizer.decode(tokens).encode("utf-8", "replace"), np.uint8)


def _common(some: NDArray[np.uint8], whole: NDArray[np.uint8]) -> int:
    """How many bytes two texts have in common at their beginning.

    They part where a character is cut: what there is of it is decoded as a sign of its own.
    """
    size = min(len(some), len(whole))
    differing = np.flatnonzero(some[:size] != whole[:size])
    return int(differing[0]) if len(differing) else size


def _spread(there: int, wanted: int, *, seed: int, source: str) -> _Integers:
    """`wanted` of the positions of `there` sequences, evenly spread, the first by the seed."""
    if wanted == there:
        return np.arange(there)
    digest = hashlib.blake2b(f"{seed}:validation:{source}".encode(), digest_size=8).digest()
    first = int.from_bytes(digest, "little") % there
    return (np.arange(wanted) * there + first) // wanted
