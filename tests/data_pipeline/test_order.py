"""The order of samples is a permutation in each epoch, different for each epoch and seed."""

from typing import Any

import numpy as np
import pytest

from data_pipeline.reading.order import Order

SIZES = (1, 2, 3, 4, 5, 16, 17, 255, 1000, 45_167)


def order(num_samples: int, *, seed: int = 7, source: str = "en", **settings: int) -> Order:
    return Order(num_samples=num_samples, seed=seed, source=source, **settings)


def epoch_of(chosen: Order, epoch: int = 0) -> np.ndarray:
    first = epoch * chosen.num_samples
    epochs, positions = chosen.at(np.arange(first, first + chosen.num_samples))
    assert (epochs == epoch).all()
    return positions


@pytest.mark.parametrize("num_samples", SIZES)
@pytest.mark.parametrize(
    ("block_size", "window"), [(1, None), (1, 1), (7, 3), (64, 1), (64, 4), (100, 5), (13, 10**6)]
)
def test_each_epoch_is_a_permutation(num_samples: int, block_size: int, window: int | None) -> None:
    chosen = Order(
        num_samples=num_samples, seed=7, source="en", block_size=block_size, window=window
    )
    epochs, positions = chosen.at(np.arange(3 * num_samples))
    for epoch in range(3):
        assert np.array_equal(np.sort(positions[epochs == epoch]), np.arange(num_samples))


@pytest.mark.parametrize("windowed", [{}, {"block_size": 10, "window": 20}])
def test_epochs_seeds_and_sources_have_other_orders(windowed: dict[str, Any]) -> None:
    orders = [
        epoch_of(order(1000, seed=seed, source=source, **windowed), epoch)
        for seed in (0, 1, -1)
        for source in ("en", "fr")
        for epoch in (0, 1, 2)
    ]
    for number, one in enumerate(orders):
        for other in [np.arange(1000), *orders[:number]]:
            # Two independent permutations agree in one place on average, hardly ever in ten.
            assert (one == other).sum() < 10


@pytest.mark.parametrize("windowed", [{}, {"block_size": 64, "window": 64}])
def test_order_looks_random(windowed: dict[str, Any]) -> None:
    positions = epoch_of(order(4096, seed=3, **windowed))
    # Correlation of n independent pairs has standard deviation 1/√n; five of them are the bound.
    bound = 5 / np.sqrt(4096)
    assert abs(np.corrcoef(np.arange(4096), positions)[0, 1]) < bound
    assert abs(np.corrcoef(positions[:-1], positions[1:])[0, 1]) < bound


@pytest.mark.parametrize("windowed", [{}, {"block_size": 8, "window": 2}])
def test_a_sample_comes_anywhere_in_an_epoch(windowed: dict[str, Any]) -> None:
    num_epochs = 3200
    _, positions = order(64, **windowed).at(np.arange(num_epochs * 64))
    for place in (0, 31, 63):
        counts = np.bincount(positions.reshape(num_epochs, 64)[:, place], minlength=64)
        # 64 counts of mean 50: chi-squared has mean 63, standard deviation √126; six of them.
        assert ((counts - 50) ** 2 / 50).sum() < 63 + 6 * np.sqrt(126)


@pytest.mark.parametrize("num_samples", [1000, 1003])
def test_a_window_has_samples_of_its_own_blocks_only(num_samples: int) -> None:
    positions = epoch_of(order(num_samples, block_size=10, window=8))
    windows = [
        set((positions[start : start + 80] // 10).tolist()) for start in range(0, num_samples, 80)
    ]
    own = [blocks for blocks in windows if len(blocks) == 8]
    if num_samples % 10 == 0:
        assert len(own) == 12  # of 13; the last has what is left, four blocks
    # A ragged block brings some samples of the last window's blocks into its own window.
    assert len(own) >= 11
    assert max(map(len, windows)) <= 8 + 8
    seen = [block for blocks in own for block in blocks]
    assert len(seen) == len(set(seen)), "a block is in one window"
    # Inside a window samples are mixed, and blocks near each other in it aren't near in store.
    assert (np.diff(positions) == 1).sum() < 30
    assert len(set(np.diff(sorted(own[0])).tolist())) > 1


def test_order_is_frozen() -> None:
    # Checkpoints hold a sample index only: another order under it would train on texts twice.
    assert epoch_of(order(8, seed=0)).tolist() == [6, 4, 1, 0, 7, 5, 3, 2]
    windowed = order(8, seed=0, block_size=2, window=2)
    assert epoch_of(windowed).tolist() == [3, 2, 1, 0, 5, 7, 4, 6]


def test_an_order_is_sought_as_far_as_one_likes() -> None:
    chosen = order(10**9 + 7, seed=1, block_size=4096, window=32)
    far = np.arange(10**12, 10**12 + 500)
    epochs, positions = chosen.at(far)
    assert (epochs == 999).all()
    assert ((positions >= 0) & (positions < 10**9 + 7)).all()
    assert len(set(positions.tolist())) == 500
    one_by_one = [chosen.at(far[place : place + 1])[1].item() for place in range(20)]
    assert one_by_one == positions[:20].tolist()


def test_negative_index_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        order(5).at(np.array([-1]))
    with pytest.raises(ValueError, match="window=0"):
        order(5, window=0)
