"""What a scaling benchmark measures: one quantity grown tenfold at a time, all else equal."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_EXPONENT = 1.1


def _nothing(size: int, folder: Path) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Case:
    """One quantity and the work whose time and memory are measured as it grows."""

    name: str
    """`area/quantity`, such as `build/documents`."""
    unit: str
    """What a size counts."""
    sizes: tuple[int, ...]
    """In ascending order, at least two, wide enough that fixed costs don't hide the growth."""
    run: Callable[[int, Path], None]
    """The measured work. It gets the size and the folder that `prepare` filled."""
    prepare: Callable[[int, Path], None] = _nothing
    """Runs before, in a process of its own: neither its time nor its memory counts."""
    max_exponent: float = MAX_EXPONENT
    """The most that time may grow with, as a power of the size: 0.1 where it should be constant."""
