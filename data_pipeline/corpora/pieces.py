"""Cutting a corpus into parts: which files, and which lines of them, are read together.

A function of the files' names, sizes and kinds alone, so that the parts are the same wherever and
by however many processes they are read.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.corpora.corpus_files import CorpusFile
from data_pipeline.corpora.text_files import has_lines, text_size

_BYTES_AT_ONCE = 2**20


@dataclass(frozen=True)
class Piece:
    """A file, or the lines of it that begin at `begin` ≤ byte < `end`."""

    file: CorpusFile
    begin: int = 0
    end: int | None = None
    """None: the whole file."""

    @property
    def num_bytes(self) -> int:
        """Roughly how many bytes of text it has."""
        if self.end is None:
            return text_size(self.file.name, self.file.size)
        return self.end - self.begin


def cut_files(root: Path, files: Sequence[CorpusFile], part_bytes: int) -> list[tuple[Piece, ...]]:
    """The pieces of each part, in the order of the files.

    Parts are even: the total is divided by the number of parts of at most `part_bytes`. Files of
    JSON lines are cut; any other is in the part that its middle falls into.
    """
    return _cut(files, part_bytes, can_cut=lambda file: has_lines(root / file.name))


def _cut(
    files: Iterable[CorpusFile], part_bytes: int, *, can_cut: Callable[[CorpusFile], bool]
) -> list[tuple[Piece, ...]]:
    whole = [Piece(file) for file in files]
    total = sum(piece.num_bytes for piece in whole)
    num_parts = -(-total // part_bytes)
    if num_parts <= 1:
        return [tuple(whole)]
    parts: list[list[Piece]] = [[] for _ in range(num_parts)]
    start = 0
    for piece in whole:
        end = start + piece.num_bytes
        first, last = start * num_parts // total, (end - 1) * num_parts // total
        if piece.num_bytes and first != last and can_cut(piece.file):
            cuts = [
                -(-number * total // num_parts) - start for number in range(first + 1, last + 1)
            ]
            for number, begin, stop in zip(
                range(first, last + 1), [0, *cuts], [*cuts, piece.file.size], strict=True
            ):
                parts[number].append(Piece(piece.file, begin, stop))
        else:
            middle = (start + end) // 2
            parts[min(middle * num_parts // total, num_parts - 1)].append(piece)
        start = end
    return [tuple(part) for part in parts if part]


def num_lines_in(path: Path, *, begin: int, end: int) -> int:
    """How many lines of a file begin at `begin` ≤ byte < `end`."""
    # A line begins after the end of another, the first one at 0.
    number, place = int(begin == 0 < end), max(begin - 1, 0)
    with path.open("rb") as file:
        file.seek(place)
        while place < end - 1 and (read := file.read(min(_BYTES_AT_ONCE, end - 1 - place))):
            number += read.count(b"\n")
            place += len(read)
    return number
