"""The blocks of a tensor as a manifest holds them: one line a tensor, read when they are needed.

Ranks cut a tensor along a grid. A line holds where the grid cuts each dimension and which file has
each cell, a number a block; blocks that are no grid are listed one by one. Owns that form, and
whether blocks make up a tensor. Knows no files.
"""

import json
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, product
from typing import Any, NamedTuple


class BlocksError(ValueError):
    """A line of blocks can't be read."""


class Block(NamedTuple):
    """A part of a tensor: its offset and its size in each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Grid(NamedTuple):
    """Blocks that cut a tensor at the same places everywhere."""

    cuts: Sequence[Sequence[int]]
    """Where the blocks of each dimension begin."""
    files: Sequence[int]
    """The number of each cell's file, the last dimension's cells side by side."""


class Line:
    """The JSON of a tensor's blocks, in some of `num_files` files; parsed when first asked for.

    Tensors that are cut alike share one: it is parsed once, and pickled once.
    """

    def __init__(self, text: bytes, *, num_files: int) -> None:
        self._text, self._num_files = text, num_files

    @cached_property
    def found(self) -> Grid | dict[str, Block]:
        """The blocks; raises BlocksError if they are none."""
        try:
            value = json.loads(self._text)
            if isinstance(value, dict):
                return {file: Block(*map(tuple, block)) for file, block in value.items()}
            cuts, files = value
            # Compact, since a rank may hold millions; and refuses what is no number.
            grid = Grid([array("Q", c) for c in cuts], array("I", files))
            if any(number >= self._num_files for number in grid.files):
                raise ValueError("they are in a file that the manifest doesn't list")
            if math.prod(map(len, grid.cuts)) != len(grid.files):
                raise ValueError(f"{len(grid.files)} files hold the cells of {list(cuts)}")
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise BlocksError(str(error)) from error
        return grid


class StoredBlocks(Mapping[str, Block]):
    """The blocks of one tensor by file. Whatever asks for them raises BlocksError if they are none.

    The line is parsed when a block is asked for.
    """

    def __init__(self, line: Line, *, shape: tuple[int, ...], files: Sequence[str]) -> None:
        self._line, self._shape, self._files = line, shape, files

    def meeting(self, wanted: Block) -> Iterator[tuple[str, Block]]:
        """Returns the blocks that may overlap a part of the tensor; of a grid, only those."""
        found = self._found
        if not isinstance(found, Grid):
            yield from found.items()
            return
        ranges = [
            range(max(0, bisect_right(cuts, begin) - 1), bisect_left(cuts, begin + size))
            for cuts, begin, size in zip(found.cuts, *wanted, strict=True)
        ]
        for place in product(*ranges):
            yield self._cell(found, place)

    def __len__(self) -> int:
        return len(self._found.files if isinstance(self._found, Grid) else self._found)

    def __iter__(self) -> Iterator[str]:
        if isinstance(self._found, Grid):
            return (self._files[number] for number in self._found.files)
        return iter(self._found)

    def __getitem__(self, file: str) -> Block:
        found = self._found
        if not isinstance(found, Grid):
            return found[file]
        for cell, number in enumerate(found.files):
            if self._files[number] == file:
                place = []
                for cuts in reversed(found.cuts):
                    cell, index = divmod(cell, len(cuts))
                    place.append(index)
                return self._cell(found, tuple(reversed(place)))[1]
        raise KeyError(file)

    def plain(self) -> dict[str, Block]:
        """Returns all of them."""
        found = self._found
        if not isinstance(found, Grid):
            return dict(found)
        places = product(*(range(len(cuts)) for cuts in found.cuts))
        return dict(self._cell(found, place) for place in places)

    def unsound(self) -> str | None:
        """Returns what is wrong with the blocks; None where they make up the tensor."""
        try:
            found = self._found
        except BlocksError as error:
            return f"has blocks that can't be read: {error}"
        if not isinstance(found, Grid):
            return unsound(found, self._shape, self._files)
        if not all(
            cuts and cuts[0] == 0 and all(a < b for a, b in pairwise([*cuts, size]))
            for cuts, size in zip(found.cuts, self._shape, strict=True)
        ):
            return f"of shape {self._shape} is not cut inside it"
        if len(found.files) != math.prod(map(len, found.cuts)):
            return "has other parts in its files than make it up"
        if len(set(found.files)) != len(found.files):
            return "has a part that is there twice"
        return None

    def _cell(self, grid: Grid, place: tuple[int, ...]) -> tuple[str, Block]:
        number, offset, shape = 0, [], []
        for cuts, index, size in zip(grid.cuts, place, self._shape, strict=True):
            number = number * len(cuts) + index
            offset.append(cuts[index])
            shape.append((cuts[index + 1] if index + 1 < len(cuts) else size) - cuts[index])
        return self._files[grid.files[number]], Block(tuple(offset), tuple(shape))

    @property
    def _found(self) -> Grid | dict[str, Block]:
        found = self._line.found
        if isinstance(found, Grid) and len(found.cuts) != len(self._shape):
            raise BlocksError(f"{len(found.cuts)} dimensions of {len(self._shape)} are cut")
        return found


def blocks_line(
    blocks: Mapping[str, Block], shape: tuple[int, ...], numbers: Mapping[str, int]
) -> str:
    """Returns the JSON of a tensor's blocks; `numbers` has the number of each file."""
    if isinstance(blocks, StoredBlocks):
        blocks = blocks.plain()
    grid = _as_grid(blocks, shape, numbers)
    return json.dumps(blocks if grid is None else grid, separators=(",", ":"))


def _as_grid(
    blocks: Mapping[str, Block], shape: tuple[int, ...], numbers: Mapping[str, int]
) -> Grid | None:
    """Returns blocks as a grid; None where they are none."""
    if not blocks or any(file not in numbers for file in blocks):
        return None
    if any(len(b.offset) != len(shape) or len(b.shape) != len(shape) for b in blocks.values()):
        return None
    cuts = [sorted({b.offset[dim] for b in blocks.values()}) for dim in range(len(shape))]
    if math.prod(map(len, cuts)) != len(blocks) or any(c[0] != 0 for c in cuts):
        return None
    steps = [
        {begin: (index, end - begin) for index, (begin, end) in enumerate(pairwise([*c, size]))}
        for c, size in zip(cuts, shape, strict=True)
    ]
    files = [-1] * len(blocks)
    for file, block in blocks.items():
        cell = 0
        for step, begin, size in zip(steps, *block, strict=True):
            index, expected = step[begin]
            if size != expected or size <= 0:
                return None
            cell = cell * len(step) + index
        files[cell] = numbers[file]
    return Grid(cuts, files) if -1 not in files else None


def unsound(
    blocks: Mapping[str, Block], whole: tuple[int, ...], files: Collection[str]
) -> str | None:
    """Returns what is wrong with a tensor's blocks; None where they cover it exactly once."""
    if isinstance(blocks, StoredBlocks):
        return blocks.unsound()
    for file, (offset, shape) in blocks.items():
        if file not in files:
            return f"is in {file!r}, which the manifest doesn't list"
        if not (
            len(offset) == len(shape) == len(whole)
            and all(map(is_count, (*offset, *shape)))
            and all(o + n <= size for o, n, size in zip(offset, shape, whole, strict=True))
        ):
            return f"of shape {whole} has a block from {offset} of shape {shape}"
    if sum(math.prod(block.shape) for block in blocks.values()) != math.prod(whole):
        return "has other parts in its files than make it up"
    if len(blocks) > 1 and _meet(list(blocks.values()), num_dims=len(whole)):
        return "has a part that is there twice"
    return None


def _meet(blocks: list[Block], *, num_dims: int) -> bool:
    """Returns whether any two blocks overlap; fast for blocks that form a grid."""
    dim = max(range(num_dims), key=lambda d: len({block.offset[d] for block in blocks}), default=0)
    reaching: list[Block] = []
    for block in sorted(blocks, key=lambda b: b.offset[dim : dim + 1]):
        reaching = [b for b in reaching if b.offset[dim] + b.shape[dim] > block.offset[dim]]
        for other in reaching:
            pairs = zip(block.offset, block.shape, other.offset, other.shape, strict=True)
            if all(a < b + n and b < a + m for a, m, b, n in pairs):
                return True
        reaching.append(block)
    return False


def is_count(value: Any) -> bool:
    """Returns whether a value of JSON is a whole number of at least 0."""
    return type(value) is int and value >= 0
