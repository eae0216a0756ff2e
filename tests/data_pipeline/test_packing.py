"""Every token is in one sequence, and best fit packs as well as it provably can."""

from itertools import pairwise

import numpy as np
import pytest

from data_pipeline import Packing
from data_pipeline.reading.packing import PackedDocuments, best_fit, packed


def starts_of(lengths: list[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def random_lengths(num_documents: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).geometric(1 / 30, num_documents)


def room_left(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as the textbooks have it, one item at a time."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(left, place) for place, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting)[1]] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


def sequences(found: PackedDocuments) -> list[list[tuple[int, int, int]]]:
    """The (document, offset, length) of each piece of each sequence, in their order."""
    pieces = found.pieces(np.arange(found.num_sequences))
    made: list[list[tuple[int, int, int]]] = [[] for _ in range(found.num_sequences)]
    ends = [0] * found.num_sequences
    for row, slot, *piece in zip(
        *(
            array.tolist()
            for array in (
                pieces.rows, pieces.slots, pieces.documents, pieces.offsets, pieces.lengths
            )
        ),
        strict=True,
    ):  # fmt: skip
        assert slot == ends[row], "pieces stand one after the other"
        ends[row] += piece[2]
        made[row].append(tuple(piece))
    return made


def test_best_fit_leaves_the_room_that_packing_one_by_one_leaves() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        capacity = int(random.integers(1, 40))
        lengths = random.integers(1, capacity + 1, size=int(random.integers(1, 200)))
        bins = best_fit(lengths, capacity=capacity)
        used = np.bincount(bins, weights=lengths).astype(int)
        assert sorted((capacity - used).tolist()) == room_left(lengths.tolist(), capacity)
        first_items = np.unique(bins, return_index=True)[1]
        assert (np.diff(first_items) > 0).all(), "bins are in the order of their first items"


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("seq_len", [1, 7, 64, 10**5])
@pytest.mark.parametrize("lengths", [[5], [64], [1, 1, 1], [200, 3, 64, 128, 1], None])
def test_each_token_stands_in_one_sequence(
    packing: Packing, seq_len: int, lengths: list[int] | None
) -> None:
    chosen = np.array(lengths) if lengths else random_lengths(500)
    found = packed(starts_of(chosen), seq_len=seq_len, packing=packing)
    covered: list[list[tuple[int, int]]] = [[] for _ in chosen]
    for sequence in sequences(found):
        assert 0 < sum(length for _, _, length in sequence) <= seq_len
        for document, offset, length in sequence:
            covered[document].append((offset, offset + length))
    for length, extents in zip(chosen.tolist(), covered, strict=True):
        extents.sort()
        assert extents[0][0] == 0
        assert extents[-1][1] == length
        assert all(one[1] == other[0] for one, other in pairwise(extents))


@pytest.mark.parametrize("packing", list(Packing))
def test_a_sequence_is_the_same_among_any_others(packing: Packing) -> None:
    found = packed(starts_of(random_lengths(300)), seq_len=64, packing=packing)
    every = sequences(found)
    positions = np.array([3, 99, 0, 3, found.num_sequences - 1])
    pieces = found.pieces(positions)
    for row, position in enumerate(positions.tolist()):
        here = pieces.rows == row
        assert (
            list(
                zip(
                    pieces.documents[here].tolist(),
                    pieces.offsets[here].tolist(),
                    pieces.lengths[here].tolist(),
                    strict=True,
                )
            )
            == every[position]
        )
    assert not len(found.pieces(positions[:0]).rows)


@pytest.mark.parametrize("packing", list(Packing))
def test_report_counts_what_is_cut_and_what_is_padding(packing: Packing) -> None:
    lengths = random_lengths(400)
    found = packed(starts_of(lengths), seq_len=64, packing=packing)
    made, report = sequences(found), found.report()
    times = np.bincount([document for sequence in made for document, _, _ in sequence])
    assert report.num_sequences == len(made)
    assert report.num_documents == 400
    assert report.num_tokens == lengths.sum()
    assert report.num_cut_documents == (times > 1).sum()
    assert report.num_cut_tokens == lengths[times > 1].sum()
    assert report.num_padding == 64 * len(made) - lengths.sum()


def test_best_fit_cuts_only_what_is_longer_than_a_sequence() -> None:
    lengths = random_lengths(2000)
    stream, fitted = (
        packed(starts_of(lengths), seq_len=64, packing=packing).report() for packing in Packing
    )
    assert fitted.num_cut_documents == (lengths > 64).sum()
    assert fitted.num_cut_tokens < stream.num_cut_tokens
    assert fitted.num_padding < 0.01 * fitted.num_tokens


def test_best_fit_holds_text_from_near_each_other_only() -> None:
    lengths = random_lengths(2**16 + 5000)
    found = packed(starts_of(lengths), seq_len=256, packing=Packing.best_fit)
    pieces = found.pieces(np.arange(found.num_sequences))
    groups = pieces.documents // 2**16
    first = groups[np.flatnonzero(pieces.slots == 0)]
    assert np.array_equal(groups, first[pieces.rows])
    assert (np.diff(pieces.documents[pieces.slots == 0]) >= 0).all()
    assert pieces.lengths.sum() == lengths.sum()
