"""Baselines: what models that need no training reach on the same text, in bits per byte.

Owns the two figures that a run prints next to its own. Both use the validation text only as a
language model would: the bigram model is fitted on the training text.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.index import SPLITS, Baselines

_START = 256  # the symbol before the first byte of a document
# Documents are counted in batches, because the table of pairs is larger than most of them. A batch
# is small enough for its pairs, eight bytes each, to stay in the processor's cache.
_BYTES_AT_ONCE = 2**19


@dataclass(frozen=True, kw_only=True)
class BaselineCounts:
    """What the baselines need to know of a part of a source.

    `pairs` [257, 256] counts (previous byte, byte) in each split. `deflated_bytes` is the size of
    its validation documents after zlib level 9, as one stream in stored order.
    """

    pairs: dict[str, NDArray[np.int64]]
    deflated_bytes: int


def baselines_of(parts: Iterable[BaselineCounts]) -> Baselines:
    """The figures of a source, from the counts of its parts.

    A byte-bigram model with add-one smoothing, fitted on the training documents, and zlib level 9
    over all validation documents, a stream for each part.
    """
    counted = {split: np.zeros((257, 256), np.int64) for split in SPLITS}
    deflated_bytes = 0
    for part in parts:
        deflated_bytes += part.deflated_bytes
        for split, pairs in part.pairs.items():
            counted[split] += pairs
    train, validation = counted["train"] + 1, counted["validation"]
    num_bytes = int(validation.sum())
    if num_bytes == 0:
        return Baselines(byte_bigram_bits_per_byte=None, zlib_bits_per_byte=None)
    bits = -np.log2(train / train.sum(axis=1, keepdims=True))
    return Baselines(
        byte_bigram_bits_per_byte=float((validation * bits).sum() / num_bytes),
        zlib_bits_per_byte=8 * deflated_bytes / num_bytes,
    )


class BaselineCounter:
    """Reads each document of a part once."""

    def __init__(self) -> None:
        self._pairs = {split: np.zeros((257, 256), np.int64) for split in SPLITS}
        self._waiting: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        self._waiting_bytes = 0
        self._deflate = zlib.compressobj(level=9)
        self._deflated_bytes = 0

    def add(self, content: bytes, *, split: str) -> None:
        """Adds a document's bytes to the counts of its split."""
        self._waiting[split].append(content)
        self._waiting_bytes += len(content)
        if self._waiting_bytes >= _BYTES_AT_ONCE:
            self._count()
        if split == "validation":
            self._deflated_bytes += len(self._deflate.compress(content))

    def counts(self) -> BaselineCounts:
        """Returns the counts; nothing can be added afterwards."""
        self._count()
        self._deflated_bytes += len(self._deflate.flush())
        return BaselineCounts(pairs=self._pairs, deflated_bytes=self._deflated_bytes)

    def baselines(self) -> Baselines:
        """Returns the figures of a source of one part; nothing can be added afterwards."""
        return baselines_of([self.counts()])

    def _count(self) -> None:
        for split, contents in self._waiting.items():
            if contents:
                _count_pairs(contents, into=self._pairs[split].reshape(-1))
                contents.clear()
        self._waiting_bytes = 0


def _count_pairs(contents: list[bytes], *, into: NDArray[np.int64]) -> None:
    """Adds the pairs (previous byte, byte) of documents, none of which is empty, to [257 * 256]."""
    joined = b"".join(contents) if len(contents) > 1 else contents[0]
    codes = np.frombuffer(joined, np.uint8)
    starts = np.cumsum([0, *map(len, contents[:-1])])
    # A long document in pieces, because its pairs take eight times its memory.
    for first in range(0, len(codes), 2 * _BYTES_AT_ONCE):
        piece = codes[first : first + 2 * _BYTES_AT_ONCE]
        pairs = np.empty(len(piece), np.intp)
        np.multiply(piece[:-1], 256, out=pairs[1:], dtype=np.intp)
        pairs[0] = int(codes[first - 1]) * 256
        pairs[starts[(starts >= first) & (starts < first + len(piece))] - first] = _START * 256
        pairs += piece
        into += np.bincount(pairs, minlength=len(into))
