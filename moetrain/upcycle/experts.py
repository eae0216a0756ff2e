"""The tensors of an upcycled model, each a pure function of the dense one's and of a seed.

Owns the source of each, and the noise and new values that make experts differ. Knows no files: it
gets a function that reads the dense model, and holds one of its matrices at a time.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.model import initial_values, random_stream
from moetrain.settings import ModelSettings

Index = tuple[slice, ...]
Read = Callable[[str, Index], Tensor]

_EXPERTS = re.compile(r"(model\.layers\.\d+\.feed_forward)\.experts\.(gate|up|down)")
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What makes the experts differ from the dense layer, and so from each other."""

    noise: float
    """Standard deviation of the noise, relative to the matrix's own."""
    reinitialize: float
    """The share of an expert's hidden units to reinitialise (Drop-Upcycling, arXiv 2502.19261)."""
    seed: int


class Upcycled:
    """The tensors of the upcycled model, made when they are asked for.

    `read` gives a tensor of the dense model, or a part of it, in float32.
    """

    def __init__(self, read: Read, *, settings: ModelSettings, changes: Changes) -> None:
        self._read = read
        self._settings = settings
        self._changes = changes
        self._kept: tuple[str, Tensor] | None = None

    def read(self, name: str, index: Index) -> Tensor:
        """Returns a tensor of the upcycled model, or the part of it that `index` says."""
        if match := _EXPERTS.fullmatch(name):
            experts, *rest = (*index, slice(None))[: max(1, len(index))]
            chosen = range(self._settings.num_experts)[experts]
            stack = torch.stack([self._expert(match[1], match[2], expert) for expert in chosen])
            return stack[(slice(None), *rest)]
        if name.endswith(".router.bias"):
            return torch.zeros(self._settings.num_experts)[index]
        if name.endswith(".router.weight"):
            shape = (self._settings.num_experts, self._settings.dim)
            return initial_values(
                name.removeprefix("model."),
                shape,
                settings=self._settings,
                seed=self._changes.seed,
                device=_CPU,
            )[index]
        return self._read(name, index)

    def _expert(self, layer: str, matrix: str, expert: int) -> Tensor:
        """Returns one expert's matrix [hidden, dim]; a row is a hidden unit's part of it."""
        dense = self._dense(f"{layer}.{matrix}_proj.weight", transposed=matrix == "down")
        changes, made = self._changes, dense
        stream = (changes.seed, "upcycle", layer)
        if changes.noise:
            noise = _normal(dense.shape, random_stream(*stream, "noise", matrix, expert))
            made = dense + changes.noise * dense.std(correction=0) * noise
        units = fresh_units(
            len(dense),
            fraction=changes.reinitialize,
            # The same for the three matrices: a unit is its rows of two and its column of one.
            stream=random_stream(*stream, "units", expert),
        )
        if len(units):
            before = dense[units]
            fresh = _normal(before.shape, random_stream(*stream, "fresh", matrix, expert))
            made = made.clone()
            made[units] = before.mean() + before.std(correction=0) * fresh
        return made

    def _dense(self, name: str, *, transposed: bool) -> Tensor:
        """Returns a matrix of the dense layer [hidden, dim]; it is kept for the next expert."""
        if self._kept is None or self._kept[0] != name:
            self._kept = None  # before the next is read: two would be held
            matrix = self._read(name, ())
            self._kept = name, matrix.T if transposed else matrix
        return self._kept[1]


def dense_name(name: str) -> str | None:
    """Returns which tensor of the dense model one of the upcycled is made from; None: of none."""
    if match := _EXPERTS.fullmatch(name):
        return f"{match[1]}.{match[2]}_proj.weight"
    return None if ".router." in name else name


def fresh_units(num_units: int, *, fraction: float, stream: int) -> Tensor:
    """Returns the hidden units of an expert to reinitialise: `fraction` of them, in order."""
    generator = torch.Generator().manual_seed(stream)
    drawn = torch.randperm(num_units, generator=generator)[: round(fraction * num_units)]
    return drawn.sort().values


def _normal(shape: torch.Size, stream: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(stream))
