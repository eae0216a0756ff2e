"""Baselines: what models that need no training reach on the same text, in bits per byte.

Owns the two figures that a run prints next to its own. Both use the validation text only as a
language model would: the bigram model is fitted on the training text.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.index import SPLITS, Baselines

_START = 256  # the symbol before the first byte of a document
# Documents are counted in batches, because the table of pairs is larger than most of them. A batch
# is small enough for its pairs, eight bytes each, to stay in the processor's cache.
_BYTES_AT_ONCE = 2**19


class BaselineCounter:
    """Reads each document once, then computes the baselines."""

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

    def baselines(self) -> Baselines:
        """Returns the figures; nothing can be added afterwards.

        A byte-bigram model with add-one smoothing, fitted on the training documents, and zlib
        level 9 over all validation documents as one stream in stored order.
        """
        self._count()
        self._deflated_bytes += len(self._deflate.flush())
        train, validation = self._pairs["train"] + 1, self._pairs["validation"]
        num_bytes = int(validation.sum())
        if num_bytes == 0:
            return Baselines(byte_bigram_bits_per_byte=None, zlib_bits_per_byte=None)
        bits = -np.log2(train / train.sum(axis=1, keepdims=True))
        return Baselines(
            byte_bigram_bits_per_byte=float((validation * bits).sum() / num_bytes),
            zlib_bits_per_byte=8 * self._deflated_bytes / num_bytes,
        )

    def _count(self) -> None:
        for split, contents in self._waiting.items():
            if contents:
                self._pairs[split] += _pair_counts(contents)
                contents.clear()
        self._waiting_bytes = 0


def _pair_counts(contents: list[bytes]) -> NDArray[np.int64]:
    """Returns counts [257, 256] of (previous byte, byte) in documents, none of which is empty."""
    codes = np.frombuffer(b"".join(contents), np.uint8)
    pairs = np.empty(len(codes), np.intp)
    np.multiply(codes[:-1], 256, out=pairs[1:], dtype=np.intp)
    pairs[np.cumsum([0, *map(len, contents[:-1])])] = _START * 256
    pairs += codes
    return np.bincount(pairs, minlength=257 * 256).reshape(257, 256)
