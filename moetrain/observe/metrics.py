"""metrics.jsonl: the record of a run that everything else is drawn from.

Owns writing it, taking it back to a step, reading it, and the loss that a run is judged by. It has
one writer. The names of the
metrics are in the public interface and are chosen where they are measured; this file only asks
that every record tells its `step`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from moetrain.observe.json_lines import append_line, read_lines

Record = Mapping[str, float | int | None]

LAST_PART = 0.1
"""The share of a run's steps, at its end, whose training loss the run is judged by."""


class MetricsFile:
    """One JSON object for each logged step, on disk for other processes as soon as it is written.

    Unlike the other sinks a failure here does stop the run: a metrics file with a hole in it
    would break the promise that the same run writes the same file. That is a disk's failure: a
    metric that is no number is none, and stands there as JSON has it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def write(self, record: Record) -> None:
        """Append a record, which must have `step`.

        Numbers that aren't finite become null, arrays become lists, and what else JSON can't hold
        becomes text.
        """
        if record.get("step") is None:
            raise ValueError(f"a metrics record needs a step; this one has {list(record)}")
        append_line(self.path, record)

    def rewind(self, step: int) -> None:
        """Forget every record after `step`, and a torn last line, in one atomic replacement.

        What is kept is kept byte for byte, so that the file of a run which goes on from `step`
        equals that of a run never stopped.
        """
        if not self.path.exists():
            return
        shorter = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with shorter.open("wb") as file:
                for line, record in read_lines(self.path):
                    if _step_of(record) <= step:
                        file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(shorter, self.path)
        finally:
            shorter.unlink(missing_ok=True)


def numbers_of(record: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Returns the metrics of a record that are numbers or None, as Python's own; never raises."""
    found: dict[str, float | int | None] = {}
    for name, value in record.items():
        try:
            if not isinstance(value, Real | None) and hasattr(value, "item"):
                value = value.item()  # a tensor or an array of one element
            if value is None:
                found[str(name)] = None
            elif isinstance(value, Real):
                number = float(value)
                found[str(name)] = int(value) if isinstance(value, Integral) else number
        except Exception:  # several elements, or a number no float can hold: no number to show
            continue
    return found


def iterate_metrics(path: Path | str) -> Iterator[dict[str, Any]]:
    """The records one by one: a long run's file needn't fit in memory."""
    return (record for _, record in read_lines(Path(path)))


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """All whole records of a metrics file, in order; a torn last line is not one of them."""
    return list(iterate_metrics(path))


def final_loss(records: Iterable[Record]) -> float | None:
    """The mean training loss over the last tenth of the steps, or the last record's.

    A record has the mean since the one before it, and counts by the tokens since then. None where
    no record has a loss.
    """
    weighted, tokens = [], 0.0
    for record in records:
        before, tokens = tokens, record.get("train/tokens") or tokens
        step, loss = record.get("step"), record.get("train/cross_entropy")
        if step is not None and loss is not None:
            weighted.append((step, loss, max(1.0, tokens - before)))
    if not weighted:
        return None
    first = (1 - LAST_PART) * weighted[-1][0]
    last = [(loss, weight) for step, loss, weight in weighted if step > first]
    return sum(loss * weight for loss, weight in last) / sum(weight for _, weight in last)


def _step_of(record: Mapping[str, Any]) -> float:
    step = record.get("step")
    # A line without a step isn't ours; infinity drops it at every rewind.
    return step if isinstance(step, (int, float)) else float("inf")
