"""The order of samples is a permutation an epoch, other for each epoch and seed, found at once."""

import time

import numpy as np
import pytest

from data_pipeline.order import permuted, sample_index, sample_indices


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 45_167])
def test_each_epoch_is_a_permutation(num_samples: int) -> None:
    indices = np.arange(3 * num_samples, dtype=np.int64)
    epochs, positions = sample_indices(indices, num_samples=num_samples, seed=7)
    for epoch in range(3):
        inside = positions[epochs == epoch]
        assert np.array_equal(np.sort(inside), np.arange(num_samples))


def test_epochs_and_seeds_have_other_orders() -> None:
    places = np.arange(1000, dtype=np.int64)
    orders = [
        permuted(places, num_samples=1000, seed=seed, epoch=epoch)
        for seed in (0, 1, -1)
        for epoch in (0, 1, 2)
    ]
    for number, order in enumerate([places, *orders]):
        for other in orders[number:]:
            # Two independent permutations agree in one place on average, hardly ever in ten.
            assert (order == other).sum() < 10


def test_order_looks_random() -> None:
    num_samples = 4096
    order = permuted(
        np.arange(num_samples, dtype=np.int64), num_samples=num_samples, seed=3, epoch=0
    )
    # Correlation of n independent pairs has standard deviation 1/√n; five of them are the bound.
    bound = 5 / np.sqrt(num_samples)
    assert abs(np.corrcoef(np.arange(num_samples), order)[0, 1]) < bound
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < bound


def test_order_is_frozen() -> None:
    # Checkpoints hold a sample index only: another order under it would train on texts twice.
    order = permuted(np.arange(8, dtype=np.int64), num_samples=8, seed=0, epoch=0)
    assert order.tolist() == [4, 2, 0, 1, 7, 5, 6, 3]


def test_seeking_far_costs_no_more_than_seeking_near() -> None:
    started = time.perf_counter()
    for _ in range(100):
        sample_index(10**12, num_samples=10**9 + 7, seed=1)
    assert (time.perf_counter() - started) / 100 < 5e-3
    epoch, position = sample_index(10**12, num_samples=10**9 + 7, seed=1)
    assert epoch == 999
    assert 0 <= position < 10**9 + 7


def test_negative_index_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        sample_index(-1, num_samples=5, seed=0)
