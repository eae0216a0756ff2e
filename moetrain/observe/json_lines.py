"""Files of one JSON object a line that survive a kill at any moment.

Owns how a record becomes a line, how a line is appended whole or not at all, and how a file with a
torn last line is read. Leaves the meaning of records to metrics.py and events.py.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 1 << 20
"""A record of many experts has some hundred kilobytes."""
_MAX_DEPTH = 20
"""Deeper nesting, or a cycle, is cut off there."""
_MAX_BITS = 10_000
"""Python refuses to write much longer integers out."""


def encode_line(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON, keys in the order given, whatever the values are.

    NaN and infinity become null, arrays and tensors lists, and what JSON has no word for text.
    """
    text = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace") + b"\n"  # JSON's own escape of a lone surrogate


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record by a single O_APPEND write, so that several processes may share a file.

    A line torn by a killed writer is closed first, lest the new record be lost with it. Raises
    OSError that names the file, with nothing half-written left where the file is ours alone.
    """
    line = encode_line(record)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(descriptor, line)
            if written != len(line):  # the disk filled up during this write
                os.ftruncate(descriptor, size)
                raise OSError(28, "No space left on device")
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line with its record, in order; none if the file doesn't exist.

    The last line counts only with its line break. Lines without a JSON object (torn by a kill and
    closed later) are skipped with a warning.
    """
    return ((line, record) for _, line, record in read_lines_at(path))


def read_lines_at(
    path: Path,
    *,
    parse: Callable[[bytes], Any] = json.loads,
    skipped: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Each line of `read_lines`, with its offset in the file; `parse` raises ValueError.

    `skipped` gets the number of each line that is skipped, instead of a warning.
    """
    try:
        file = path.open("rb", buffering=_BUFFER_BYTES)
    except FileNotFoundError:
        return
    with file:
        end = 0
        for number, line in enumerate(file, start=1):
            begin, end = end, end + len(line)
            if not line.endswith(b"\n"):
                return
            if not line.strip():
                continue
            try:
                record = parse(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield begin, line, record
            elif skipped is not None:
                skipped(number)
            else:
                logger.warning("%s, line %d isn't a JSON object; skipped", path, number)


def _plain(value: Any, *, depth: int = 0) -> Any:
    """The same value in JSON's own types; NumPy's scalars are numbers too. Never raises."""
    try:
        if depth > _MAX_DEPTH:
            return "…"
        if value is None or isinstance(value, (str, bool)):
            return value
        if isinstance(value, Integral):
            number = int(value)
            return number if number.bit_length() <= _MAX_BITS else None
        if isinstance(value, Real):
            return float(value) if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {str(key): _plain(item, depth=depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [_plain(item, depth=depth + 1) for item in value]
        if hasattr(value, "tolist"):  # of NumPy or torch
            return _plain(value.tolist(), depth=depth + 1)
        return str(value)
    except Exception:  # an object without a usable repr
        return f"<{type(value).__name__}>"
