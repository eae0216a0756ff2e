"""The order of samples: a pure function of (seed, global sample index), with nothing to remember.

Each epoch is a pseudo-random permutation of the samples, computed one position at a time by a
keyed Feistel network over a domain a little larger than the epoch, walked until it falls inside
(J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3).
Seeking costs the same anywhere: there is no list to shuffle and no state to save.
"""

import hashlib
from math import isqrt

import numpy as np
from numpy.typing import NDArray

# Four rounds make a pseudo-random permutation in theory (Luby and Rackoff, 1988); small domains,
# as those of a toy corpus, need some more.
_NUM_ROUNDS = 6


def sample_index(index: int, *, num_samples: int, seed: int) -> tuple[int, int]:
    """The (epoch, position in the stored order) of a global sample index."""
    epochs, positions = sample_indices(
        np.array([index], dtype=np.int64), num_samples=num_samples, seed=seed
    )
    return int(epochs[0]), int(positions[0])


def sample_indices(
    indices: NDArray[np.int64], *, num_samples: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The epochs [n] and stored positions [n] of global sample indices [n].

    Raises ValueError for a negative index, or an epoch with no samples.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: an epoch has at least one sample")
    if indices.size and indices.min() < 0:
        raise ValueError(f"global sample index {indices.min()} is negative")
    epochs, ranks = np.divmod(indices, num_samples)
    positions = np.empty_like(ranks)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        positions[inside] = permuted(
            ranks[inside], num_samples=num_samples, seed=seed, epoch=int(epoch)
        )
    return epochs, positions


def permuted(
    places: NDArray[np.int64], *, num_samples: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Where the permutation of range(num_samples) for (seed, epoch) sends each place [n]."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")
    side = np.uint64(isqrt(num_samples - 1) + 1)  # side² ≥ num_samples, by less than 2·side + 1
    size = np.uint64(num_samples)
    walked = _feistel(places.astype(np.uint64), side=side, keys=keys)
    while (outside := walked >= size).any():
        walked[outside] = _feistel(walked[outside], side=side, keys=keys)
    return walked.astype(np.int64)


def _feistel(
    places: NDArray[np.uint64], *, side: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = np.divmod(places, side)
    for key in keys:
        left, right = right, (left + _mixed(right ^ key) % side) % side
    joined: NDArray[np.uint64] = left * side + right
    return joined


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
