"""Digests of documents in files: which documents of a large text repeat an earlier one.

Owns exact deduplication in bounded memory. Each part of the text writes the SHA-256 of its texts in
sorted runs; a range of digests is then compared over all parts at once, and so few digests are in a
range that they fit into memory. The first text in the order of the parts is kept, as if all were
compared in memory.

A digest is four columns of a row; the fifth is the text's number in its part.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.atomic_files import new_file

_DIGEST_BYTES = 32
_TEXTS_IN_RUN = 2**21
_TEXTS_IN_RANGE = 2**21  # some 200 MB while they are compared
_ROW = np.dtype(">u8")  # big-endian, so that rows sort as digests do


class RunWriter:
    """Collects a part's digests in order, and writes them in sorted runs `STEM-00000.npy`, …"""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem
        self._waiting = bytearray()
        self.num_texts = self.num_runs = 0

    def add(self, digest: bytes) -> None:
        """Adds the digest of the next text."""
        self._waiting += digest
        self.num_texts += 1
        if len(self._waiting) == _TEXTS_IN_RUN * _DIGEST_BYTES:
            self.write()

    def write(self) -> None:
        """Writes what waits; called after the last text."""
        if not self._waiting:
            return
        digests = np.frombuffer(bytes(self._waiting), _ROW).reshape(-1, 4)
        rows = np.empty((len(digests), 5), _ROW)
        rows[:, :4] = digests
        rows[:, 4] = np.arange(self.num_texts - len(digests), self.num_texts)
        with new_file(run_path(self._folder, self._stem, self.num_runs)) as file:
            np.save(file, rows[_sorted(rows)])
        self._waiting.clear()
        self.num_runs += 1


def run_path(folder: Path, stem: str, number: int) -> Path:
    """The file of a run."""
    return folder / f"{stem}-{number:05d}.npy"


def num_ranges(num_texts: int) -> int:
    """Into how many ranges so many digests are divided; a power of two."""
    return 1 << max(0, -(-num_texts // _TEXTS_IN_RANGE) - 1).bit_length()


def repeated_in_range(
    runs: Sequence[tuple[int, Path]], *, number: int, of: int
) -> NDArray[np.int64]:
    """The texts [n, 2] of one of `of` ranges that repeat an earlier one: their parts and numbers.

    `runs` has each run with the number of its part, in the order of the texts. The result is
    sorted.
    """
    width = 2**64 // of
    found = [(part, _within(path, number * width, (number + 1) * width)) for part, path in runs]
    parts = np.repeat([part for part, _ in found], [len(rows) for _, rows in found])
    rows = np.concatenate([np.zeros((0, 5), _ROW), *(rows for _, rows in found)])
    order = _sorted(rows)
    digests = rows[order, :4]
    again = np.flatnonzero((digests[1:] == digests[:-1]).all(axis=1)) + 1
    texts = np.stack([parts[order[again]], rows[order[again], 4].astype(np.int64)], axis=1)
    ordered: NDArray[np.int64] = texts[np.lexsort((texts[:, 1], texts[:, 0]))].astype(np.int64)
    return ordered


def repeated_in_part(ranges: Iterable[Path], part: int) -> NDArray[np.int64]:
    """The numbers [n] of the texts of a part that are repeated, from the results of all ranges."""
    found = []
    for path in ranges:
        texts = np.load(path, mmap_mode="r")
        first, last = (_bisected(texts, 0, bound) for bound in (part, part + 1))
        found.append(np.array(texts[first:last, 1]))
    return np.sort(np.concatenate([np.zeros(0, np.int64), *found]))


def kept_digests(runs: Iterable[Path], repeated: NDArray[np.int64]) -> Iterator[bytes]:
    """The digests of the texts of a part that aren't repeated, in order, joined run by run."""
    for path in runs:
        rows = np.load(path)
        numbers = rows[:, 4].astype(np.int64)
        first = int(numbers.min())
        digests = np.empty((len(rows), 4), _ROW)
        digests[numbers - first] = rows[:, :4]
        here = repeated[(repeated >= first) & (repeated < first + len(rows))] - first
        yield np.delete(digests, here, axis=0).tobytes()


def _sorted(rows: NDArray[np.uint64]) -> NDArray[np.intp]:
    """The order of rows [n, 5] by their digests; equal ones stay in the order that they are in."""
    order = np.argsort(rows[:, 0].astype(np.uint64), kind="stable")
    first = rows[order, 0]
    if not len(tied := np.flatnonzero(first[1:] == first[:-1])):
        return order
    if (rows[order[tied], 1:4] == rows[order[tied + 1], 1:4]).all():
        return order
    whole: NDArray[np.intp] = np.lexsort(
        [rows[:, column].astype(np.uint64) for column in (3, 2, 1, 0)]
    )
    return whole


def _within(path: Path, begin: int, end: int) -> NDArray[np.uint64]:
    """The rows of a run whose first column is at least `begin` and below `end`."""
    rows = np.load(path, mmap_mode="r")
    return np.array(rows[_bisected(rows, 0, begin) : _bisected(rows, 0, end)])


def _bisected(rows: NDArray[np.integer], column: int, bound: int) -> int:
    # Not np.searchsorted, which would read and copy the whole column.
    return bisect.bisect_left(range(len(rows)), bound, key=lambda row: int(rows[row, column]))
