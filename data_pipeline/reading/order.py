"""The order of samples: a pure function of (seed, source, global sample index), with no state.

Each epoch is a pseudo-random permutation of the samples, computed one position at a time by a
keyed Feistel network over a domain a little larger than the epoch, walked until it falls inside
(J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3).
Seeking costs the same anywhere: there is no list to shuffle and nothing to save.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Four rounds make a pseudo-random permutation in theory (Luby and Rackoff, 1988); small domains, as
# those of a toy corpus, need a few more.
_NUM_ROUNDS = 6

_Keys = NDArray[np.uint64]  # [_NUM_ROUNDS, places]: each place may have its own keys


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order in which the `num_samples` samples of a source come, epoch after epoch.

    If `window` is None, the samples of an epoch come in any order. Else the stored order is cut
    into blocks of `block_size` samples, the blocks are shuffled, and samples are mixed among
    `window` blocks at a time, so that only those need to be available. If the last block is shorter
    than the others, the window that holds it also has a few samples (fewer than a block) of the
    last window's blocks.

    Raises ValueError for a number below one.
    """

    num_samples: int
    seed: int
    source: str
    block_size: int = 1
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "block_size", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")

    def at(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epochs [n] and stored positions [n] of this source's sample indices [n].

        Raises ValueError for a negative index.
        """
        if indices.size and indices.min() < 0:
            raise ValueError(f"sample index {indices.min()} is negative")
        epochs, places = np.divmod(indices, self.num_samples)
        distinct, which = np.unique(epochs, return_inverse=True)
        inside = self._keys("inside windows", distinct)[:, which]
        between = (
            inside if self.window is None else self._keys("between windows", distinct)[:, which]
        )
        walked = self._permuted(places.astype(np.uint64), inside, between)
        size = np.uint64(self.num_samples)
        # The blocks' permutation has a domain of whole blocks: indices past the last sample are
        # permuted again.
        while (outside := np.flatnonzero(walked >= size)).size:
            walked[outside] = self._permuted(
                walked[outside], inside[:, outside], between[:, outside]
            )
        return epochs, walked.astype(np.int64)

    def _permuted(
        self, places: NDArray[np.uint64], inside: _Keys, between: _Keys
    ) -> NDArray[np.uint64]:
        if self.window is None:
            return _permuted(places, np.uint64(self.num_samples), inside)
        num_blocks = -(-self.num_samples // self.block_size)
        block_size, width = np.uint64(self.block_size), np.uint64(self.window * self.block_size)
        windows, places = np.divmod(places, width)
        widths = np.minimum(width, np.uint64(num_blocks * self.block_size) - windows * width)
        places = _permuted(places, widths, _mixed(inside ^ _mixed(windows + np.uint64(1))))
        slots, samples = np.divmod(places, block_size)
        slots += windows * np.uint64(self.window)
        slots = _permuted(slots, np.uint64(num_blocks), between)
        joined: NDArray[np.uint64] = slots * block_size + samples
        return joined

    def _keys(self, part: str, epochs: NDArray[np.int64]) -> _Keys:
        digests = [
            hashlib.blake2b(
                f"{self.seed}:{epoch}:{part}:{self.source}".encode(), digest_size=8 * _NUM_ROUNDS
            ).digest()
            for epoch in epochs.tolist()
        ]
        return np.frombuffer(b"".join(digests), "<u8").reshape(-1, _NUM_ROUNDS).T


def _permuted(
    places: NDArray[np.uint64], size: np.uint64 | NDArray[np.uint64], keys: _Keys
) -> NDArray[np.uint64]:
    """Where the permutation of range(size) by `keys` sends each place [n]."""
    sizes = np.broadcast_to(size, places.shape)
    sides = np.ceil(np.sqrt(sizes)).astype(np.uint64)  # sides² ≥ sizes, by less than 2·sides + 1
    sides += sides * sides < sizes  # the square root of a large integer may be rounded down
    walked = _feistel(places, sides, keys)
    while (outside := np.flatnonzero(walked >= sizes)).size:
        walked[outside] = _feistel(walked[outside], sides[outside], keys[:, outside])
    return walked


def _feistel(
    places: NDArray[np.uint64], sides: NDArray[np.uint64], keys: _Keys
) -> NDArray[np.uint64]:
    left, right = np.divmod(places, sides)
    for key in keys:
        left, right = right, (left + _mixed(right ^ key) % sides) % sides
    joined: NDArray[np.uint64] = left * sides + right
    return joined


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
