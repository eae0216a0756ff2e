"""Packing: which pieces of which documents are in each sequence.

Owns the two ways to make sequences from documents, and the count of what they cut. Knows only the
lengths of documents; leaves their tokens to `reader` and arrays of batches to `batches`.

In both ways each token of a document is a target exactly once. A sequence holds contiguous pieces,
one after the other; the rest of it is padding.
"""

import bisect
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.settings import Packing

_Integers = NDArray[np.int64]

# Documents are packed in groups of this many, which bounds how far apart a sequence's texts are.
_GROUP = 2**16


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Pieces of documents and where they go; int64 arrays [pieces], in order of position.

    `rows` are the indices of the requested sequences, `slots` the first positions in them.
    `documents` and `offsets` say which document the `lengths` tokens come from, and where in it.
    """

    rows: _Integers
    slots: _Integers
    documents: _Integers
    offsets: _Integers
    lengths: _Integers


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """The result of packing a source."""

    num_sequences: int
    num_documents: int
    num_tokens: int
    num_cut_documents: int
    """Documents that are split over several sequences."""
    num_cut_tokens: int
    """Tokens of such documents."""
    num_padding: int
    """Positions of sequences that hold no token."""


class PackedDocuments(Protocol):
    """The sequences of an epoch, `num_sequences` of them in stored order."""

    num_sequences: int

    def pieces(self, positions: _Integers) -> Pieces:
        """The content of the sequences at stored positions [rows]."""
        ...

    def report(self) -> PackingReport:
        """The result of packing."""
        ...


def packed(starts: _Integers, *, seq_len: int, packing: Packing) -> PackedDocuments:
    """Sequences of documents whose starts in one joined stream are `starts` [documents + 1]."""
    if packing is Packing.stream:
        return StreamPacking(starts, seq_len=seq_len)
    return BestFitPacking(starts, seq_len=seq_len)


class StreamPacking:
    """All documents joined into one stream, which is cut every `seq_len` tokens."""

    def __init__(self, starts: _Integers, *, seq_len: int) -> None:
        self._starts = starts
        self._seq_len = seq_len
        self.num_sequences = -(-int(starts[-1]) // seq_len)

    def pieces(self, positions: _Integers) -> Pieces:
        """The content of the sequences at stored positions [rows]."""
        begins = positions * self._seq_len
        ends = np.minimum(begins + self._seq_len, self._starts[-1])
        first = self._starts.searchsorted(begins, side="right") - 1
        last = self._starts.searchsorted(ends, side="left") - 1
        rows, number = _counted(last - first + 1)
        documents = first[rows] + number
        begin = np.maximum(self._starts[documents], begins[rows])
        end = np.minimum(self._starts[documents + 1], ends[rows])
        return Pieces(
            rows=rows,
            slots=begin - begins[rows],
            documents=documents,
            offsets=begin - self._starts[documents],
            lengths=end - begin,
        )

    def report(self) -> PackingReport:
        """The result of packing."""
        first, last = self._starts[:-1] // self._seq_len, (self._starts[1:] - 1) // self._seq_len
        return _report(self._starts, first != last, self.num_sequences, self._seq_len)


class BestFitPacking:
    """Documents packed whole, each into the fullest sequence that has room for it.

    A document longer than a sequence is cut into full sequences and a remainder. Remainders and
    shorter documents are packed by best fit, longest first (Ding et al., "Fewer Truncations Improve
    Language Modeling", ICML 2024, arXiv 2404.10830).

    A sequence's stored position is about that of its first document. Its other documents come from
    up to some hundred thousand documents later. Neighbouring sequences therefore need more shards
    than with one stream, and `shuffle_window` bounds their number less tightly here.
    """

    def __init__(self, starts: _Integers, *, seq_len: int) -> None:
        self._starts = starts
        self._seq_len = seq_len
        documents, offsets, sequences = [], [], []
        self.num_sequences = 0
        for first in range(0, len(starts) - 1, _GROUP):
            lengths = np.diff(starts[first : first + _GROUP + 1])
            document, number = _counted(-(-lengths // seq_len))
            offset = number * seq_len
            bins = best_fit(np.minimum(lengths[document] - offset, seq_len), capacity=seq_len)
            order = np.argsort(bins, kind="stable")
            documents.append(first + document[order])
            offsets.append(offset[order])
            sequences.append(self.num_sequences + bins[order])
            self.num_sequences += int(bins.max()) + 1
        self._documents = np.concatenate([np.zeros(0, np.int64), *documents])  # [pieces]
        self._offsets = np.concatenate([np.zeros(0, np.int64), *offsets])
        # Where the pieces of each sequence begin, [sequences + 1].
        self._firsts = np.concatenate([np.zeros(0, np.int64), *sequences]).searchsorted(
            np.arange(self.num_sequences + 1)
        )

    def pieces(self, positions: _Integers) -> Pieces:
        """The content of the sequences at stored positions [rows]."""
        firsts = self._firsts[positions]
        rows, number = _counted(self._firsts[positions + 1] - firsts)
        pieces = firsts[rows] + number
        documents, offsets = self._documents[pieces], self._offsets[pieces]
        whole = self._starts[documents + 1] - self._starts[documents]
        lengths = np.minimum(whole - offsets, self._seq_len)
        before = np.cumsum(lengths) - lengths
        return Pieces(
            rows=rows,
            slots=before - before[number == 0][rows],
            documents=documents,
            offsets=offsets,
            lengths=lengths,
        )

    def report(self) -> PackingReport:
        """The result of packing."""
        cut = np.diff(self._starts) > self._seq_len
        return _report(self._starts, cut, self.num_sequences, self._seq_len)


def best_fit(lengths: _Integers, *, capacity: int) -> _Integers:
    """The bin of each item [items] by best-fit decreasing, in bins of `capacity` ≥ any length.

    Bins are numbered in the order of their first items. Items of equal length are placed together:
    the fullest bins with room for one take as many as fit, which equals best fit one by one. Of
    equally full bins, those are taken that are spread as the items are, so that neighbours in
    stored order tend to be neighbours in bins.
    """
    by_length = np.argsort(lengths, kind="stable")
    ends = lengths[by_length].searchsorted(np.arange(capacity + 2))
    bins = np.empty(len(lengths), dtype=np.int64)
    num_bins = 0
    # The bins with that much room, in order; the existing amounts of room, ascending.
    with_room: dict[int, list[_Integers]] = {}
    rooms: list[int] = []
    for length in range(capacity, 0, -1):
        items = by_length[ends[length] : ends[length + 1]]
        while len(items):
            place = bisect.bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms[place]
                found = with_room.pop(room)
                del rooms[place]
                open_bins = found[0] if len(found) == 1 else np.sort(np.concatenate(found))
            else:
                room = capacity
                count = -(-len(items) // (capacity // length))
                open_bins = np.arange(num_bins, num_bins + count)
                num_bins += count
            each = room // length
            num_taken = min(-(-len(items) // each), len(open_bins))
            taken, left = _spread(open_bins, num_taken)
            here, items = _spread(items, min(num_taken * each, len(items)))
            filled, rest = divmod(len(here), each)
            bins[here[: filled * each]] = np.repeat(taken[:filled], each)
            bins[here[filled * each :]] = taken[filled:]
            for amount, group in (
                (room, left),
                (room - each * length, taken[:filled]),
                (room - rest * length, taken[filled:]),
            ):
                if amount and len(group):
                    if amount not in with_room:
                        bisect.insort(rooms, amount)
                    with_room.setdefault(amount, []).append(group)
    # Number the bins by their first items.
    _, first, which = np.unique(bins, return_index=True, return_inverse=True)
    numbers = np.empty(num_bins, dtype=np.int64)
    numbers[np.argsort(first)] = np.arange(num_bins)
    return numbers[which]


def _spread(values: _Integers, count: int) -> tuple[_Integers, _Integers]:
    """`count` of the values, evenly spread, and the others."""
    if count == len(values):
        return values, values[:0]
    chosen = np.zeros(len(values), dtype=np.bool_)
    chosen[np.arange(count) * len(values) // count] = True
    return values[chosen], values[~chosen]


def _counted(counts: _Integers) -> tuple[_Integers, _Integers]:
    """For counts [2, 3]: [0, 0, 1, 1, 1] and [0, 1, 0, 1, 2]."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - (np.cumsum(counts) - counts)[which]


def _report(
    starts: _Integers, cut: NDArray[np.bool_], num_sequences: int, seq_len: int
) -> PackingReport:
    lengths = np.diff(starts)
    return PackingReport(
        num_sequences=num_sequences,
        num_documents=len(lengths),
        num_tokens=int(starts[-1]),
        num_cut_documents=int(cut.sum()),
        num_cut_tokens=int(lengths[cut].sum()),
        num_padding=num_sequences * seq_len - int(starts[-1]),
    )
