"""Packing: which pieces of which documents are in each sequence.

Owns the two ways to make sequences from documents, and the count of what they cut. Knows only the
lengths of documents; leaves their tokens to `reader` and arrays of batches to `batches`.

In both ways each token of a document is a target exactly once. A sequence holds contiguous pieces,
one after the other; the rest of it is padding.
"""

import bisect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.settings import CacheSettings, Packing
from data_pipeline.shards.node_arrays import ArrayWriter, NodeArrays

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


def packed(
    starts: _Integers,
    *,
    seq_len: int,
    packing: Packing,
    node: NodeArrays | None = None,
    made_of: object = None,
) -> PackedDocuments:
    """Sequences of documents whose starts in one joined stream are `starts` [documents + 1].

    What has to be computed beforehand is kept by `node`; `made_of` stands for the starts. None: in
    memory.
    """
    if packing is Packing.stream:
        return StreamPacking(starts, seq_len=seq_len)
    return BestFitPacking(starts, seq_len=seq_len, node=node, made_of=made_of)


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

        def is_cut(starts: _Integers) -> NDArray[np.bool_]:
            cut: NDArray[np.bool_] = (
                starts[:-1] // self._seq_len != (starts[1:] - 1) // self._seq_len
            )
            return cut

        return _report(self._starts, is_cut, self.num_sequences, self._seq_len)


class BestFitPacking:
    """Documents packed whole, each into the fullest sequence that has room for it.

    A document longer than a sequence is cut into full sequences and a remainder. Remainders and
    shorter documents are packed by best fit, longest first (Ding et al., "Fewer Truncations Improve
    Language Modeling", ICML 2024, arXiv 2404.10830).

    A sequence's stored position is about that of its first document. Its other documents come from
    up to some hundred thousand documents later. Neighbouring sequences therefore need more shards
    than with one stream, and `shuffle_window` bounds their number less tightly here.
    """

    def __init__(
        self,
        starts: _Integers,
        *,
        seq_len: int,
        node: NodeArrays | None = None,
        made_of: object = None,
    ) -> None:
        self._starts = starts
        self._seq_len = seq_len
        node = node or NodeArrays(cache=CacheSettings(), least_length=sys.maxsize)
        arrays = node.arrays(
            dict.fromkeys(("documents", "offsets", "firsts"), "<i8"),
            length=len(starts),
            made_of=["best fit 1", _GROUP, seq_len, made_of],
            write=self._pack,
        )
        self._documents, self._offsets = arrays["documents"], arrays["offsets"]  # [pieces]
        self._firsts = arrays["firsts"]  # where the pieces of each sequence begin, [sequences + 1]
        self.num_sequences = len(self._firsts) - 1

    def _pack(self, writer: ArrayWriter) -> None:
        num_pieces = 0
        writer.append(firsts=np.zeros(1, np.int64))
        for first in range(0, len(self._starts) - 1, _GROUP):
            lengths = np.diff(self._starts[first : first + _GROUP + 1])
            document, number = _counted(-(-lengths // self._seq_len))
            offset = number * self._seq_len
            bins = best_fit(
                np.minimum(lengths[document] - offset, self._seq_len), capacity=self._seq_len
            )
            order = np.argsort(bins, kind="stable")
            ends = num_pieces + np.cumsum(np.bincount(bins))
            num_pieces += len(bins)
            writer.append(documents=first + document[order], offsets=offset[order], firsts=ends)

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
        return _report(
            self._starts,
            lambda starts: np.diff(starts) > self._seq_len,
            self.num_sequences,
            self._seq_len,
        )


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
    starts: _Integers,
    is_cut: Callable[[_Integers], NDArray[np.bool_]],
    num_sequences: int,
    seq_len: int,
) -> PackingReport:
    """Counts piece by piece: there may be billions of documents."""
    num_cut_documents = num_cut_tokens = 0
    for first in range(0, len(starts) - 1, _GROUP):
        some = starts[first : first + _GROUP + 1]
        cut = is_cut(some)
        num_cut_documents += int(cut.sum())
        num_cut_tokens += int(np.diff(some)[cut].sum())
    return PackingReport(
        num_sequences=num_sequences,
        num_documents=len(starts) - 1,
        num_tokens=int(starts[-1]),
        num_cut_documents=num_cut_documents,
        num_cut_tokens=num_cut_tokens,
        num_padding=num_sequences * seq_len - int(starts[-1]),
    )
