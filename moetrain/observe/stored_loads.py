"""Expert loads as they stand in metrics.jsonl: nearly all of its bytes, which few readers need.

Owns reading a record without its loads, and one record's loads later. 61 layers of 256 experts are
350 KB of JSON, which take 10 ms to parse and 0.2 ms to skip.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrain.observe.json_lines import read_lines_at

EXPERT_LOAD = "router/expert_load"

_BEGIN = f'"{EXPERT_LOAD}": [['.encode()
_CUT = b'"\\u0000"'
"""What stands for the loads where they are skipped; no run logs it."""


class StoredLoad(NamedTuple):
    """Where a record with expert loads stands in its file."""

    offset: int
    size: int
    """Of the line, in bytes."""
    shape: tuple[int, int]
    """Layers and experts."""


def expert_load(record: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Returns the share of a layer's tokens that each expert got, [MoE layers, experts].

    NaN where a value is missing; None where the record has no such matrix.
    """
    try:
        loads = np.array(record.get(EXPERT_LOAD), dtype=np.float64)
    except (TypeError, ValueError):  # rows of unlike lengths, or no numbers
        return None
    return loads if loads.ndim == 2 and loads.size else None


def records_without_loads(
    path: Path, *, skipped: Callable[[int], object] | None = None
) -> Iterator[tuple[dict[str, Any], StoredLoad | None]]:
    """Each whole record of a metrics file without its expert loads, and where they stand.

    `skipped` gets the number of each line that isn't a record, instead of a warning.
    """
    for offset, line, record in read_lines_at(path, parse=parse_cut, skipped=skipped):
        shape = None
        if EXPERT_LOAD in record:
            loads = record.pop(EXPERT_LOAD)
            if isinstance(loads, _Shape):
                shape = loads.layers, loads.experts
            elif (found := expert_load({EXPERT_LOAD: loads})) is not None:
                shape = found.shape[0], found.shape[1]
        yield record, StoredLoad(offset, len(line), shape) if shape else None


def read_load(path: Path, stored: StoredLoad) -> NDArray[np.float64] | None:
    """Returns one record's expert loads; None where they are no matrix after all."""
    with path.open("rb") as file:
        file.seek(stored.offset)
        try:
            return expert_load(json.loads(file.read(stored.size)))
        except ValueError:  # something else than numbers between the brackets
            return None


class _Shape(NamedTuple):
    """Stands for the loads in a record that was parsed without them."""

    layers: int
    experts: int


def parse_cut(line: bytes) -> Any:
    """Parses a line; the value of `router/expert_load` becomes a `_Shape` if it is a matrix.

    Where the text isn't exactly as `append_line` writes it, all of it is parsed.
    """
    begin = line.find(_BEGIN)
    if begin < 0:
        return json.loads(line)
    begin += len(_BEGIN) - 2
    end = line.find(b"]]", begin) + 2
    # No text and no object in it, so that the brackets are those of numbers.
    shape = None if end < 2 or line.find(b'"', begin, end) >= 0 else _shape(line, begin, end)
    if shape is None:
        return json.loads(line)
    try:
        record = json.loads(line[:begin] + _CUT + line[end:])
    except ValueError:
        return json.loads(line)
    if not isinstance(record, dict) or record.get(EXPERT_LOAD) != "\0":
        return json.loads(line)
    return {**record, EXPERT_LOAD: shape}


def _shape(line: bytes, begin: int, end: int) -> _Shape | None:
    """Returns the shape of the matrix in a part of a line; None where its layers differ."""
    layers, commas = 0, -1
    at = begin + 1
    while (at := line.find(b"[", at, end)) >= 0:
        close = line.find(b"]", at, end)
        found = line.count(b",", at, close)
        if close == at + 1 or (layers and found != commas):
            return None
        layers, commas, at = layers + 1, found, close
    return _Shape(layers, commas + 1)
