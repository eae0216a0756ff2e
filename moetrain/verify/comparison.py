"""What is compared, tensor by tensor and expert by expert, and how differences are measured.

Knows no process group: tensors come gathered, so that row e of a stacked weight is global expert e.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

KINDS = ("dense", "router", "experts")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The worst of some differences, relative to the tolerance."""

    relative: float
    """Relative to the norm of the reference."""
    allowed: float
    where: str
    """The tensor, figure or expert that differs."""

    @property
    def passes(self) -> bool:
        """Whether rounding explains it; NaN never passes."""
        return self.relative <= self.allowed


def worst(differences: Iterable[Difference]) -> Difference | None:
    """Returns the largest difference relative to its tolerance; None if there are none."""
    return max(differences, key=lambda d: (not d.passes, _excess(d)), default=None)


def kind_of(name: str) -> str:
    """Returns which column a parameter belongs to, by its plain name."""
    for kind in ("experts", "router"):
        if f".{kind}." in name:
            return kind
    return "dense"


def parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Returns what is compared by itself: each expert of a stacked weight, else the tensor."""
    if kind_of(name) != "experts":
        return [(name, tensor)]
    return [(f"{name} of expert {expert}", part) for expert, part in enumerate(tensor)]


def difference(
    where: str, ours: Tensor, theirs: Tensor, *, allowed: float, scale: float | None = None
) -> Difference:
    """Returns how far two tensors are apart, relative to `scale` or to the norm of the second."""
    if ours.shape != theirs.shape:
        return Difference(relative=inf, allowed=allowed, where=f"{where} (another shape)")
    error = float(torch.linalg.vector_norm(ours.double() - theirs.double()))
    scale = norm(theirs) if scale is None else scale
    relative = error / scale if scale > 0 else inf
    if error == 0:
        relative = 0.0
    elif math.isnan(relative):
        relative = inf
    return Difference(relative=relative, allowed=allowed, where=where)


def norm(tensor: Tensor) -> float:
    """Returns the norm of all of a tensor's elements, summed in float64."""
    return float(torch.linalg.vector_norm(tensor.double()))


def _excess(difference: Difference) -> float:
    if difference.allowed > 0:
        return difference.relative / difference.allowed
    return inf if difference.relative > 0 else 0.0
