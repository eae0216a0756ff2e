"""metrics.jsonl: the record of a run from which everything else is drawn.

Owns writing it, rewinding it to a step, reading it, and the loss that a run is judged by. It has
one writer. The names of metrics are public and chosen where they are measured; this file requires a
`step` in every record, and parses names with parts.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.atomic_files import new_file
from moetrain.observe.json_lines import append_line, read_lines, read_lines_at
from moetrain.observe.stored_loads import parse_cut, records_without_loads

Value = TypeVar("Value")

Record = Mapping[str, Any]
"""Metrics by name: numbers, None for what isn't finite, and `router/expert_load`, a matrix."""

LAST_PART = 0.1
"""The last part of a run's steps whose training loss the run is judged by."""


class Sink(ABC):
    """Where the metric records of a run go, in the order of their steps; on one rank only."""

    @abstractmethod
    def write(self, record: Record) -> None:
        """Takes one record. What it raises stops the run."""

    def close(self, exit_code: int) -> None:  # noqa: B027 - most have nothing to close
        """Ends the sink with the run, which ends with an exit code."""


class GuardedSink(Sink):
    """A sink of an extension; if it fails it is dropped, and training continues."""

    def __init__(self, make: Callable[[], Sink], *, name: str, fail: Callable[[str], None]) -> None:
        """`fail` is called once, with what the sink raised."""
        self._name, self._fail = name, fail
        self._sink: Sink | None = None
        self._guarded(lambda: setattr(self, "_sink", make()))

    def write(self, record: Record) -> None:
        """Passes the record on, unless the sink has failed."""
        if (sink := self._sink) is not None:
            self._guarded(lambda: sink.write(record))

    def close(self, exit_code: int) -> None:
        """Closes the sink, unless it has failed."""
        if (sink := self._sink) is not None:
            self._guarded(lambda: sink.close(exit_code))

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._sink = None
            reason = f"{type(error).__name__}: {error}"
            self._fail(f"sink {self._name} failed and gets no more records: {reason}")


class MetricsFile(Sink):
    """One JSON object for each logged step, visible to other processes as soon as it is written.

    Unlike the other sinks a failure here stops the run: a gap in the file would break the promise
    that the same run writes the same file. Only the disk can fail: a metric that isn't a number is
    written as JSON allows.
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
        """Removes every record after `step`, and a torn last line, in one atomic replacement.

        What stays is kept byte for byte, so that the file of a run resumed from `step` equals that
        of a run that never stopped.
        """
        if not self.path.exists() or self._ends_at(step):
            return
        with new_file(self.path) as shorter:
            for _, line, record in read_lines_at(self.path, parse=parse_cut):
                if _step_of(record) <= step:
                    shorter.write(line)

    def _ends_at(self, step: int) -> bool:
        """Returns whether nothing is to be removed: there may be gigabytes to copy."""
        kept = 0
        for begin, line, record in read_lines_at(self.path, parse=parse_cut):
            if begin != kept or _step_of(record) > step:
                return False
            kept = begin + len(line)
        return kept == self.path.stat().st_size


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


def by_source(values: Mapping[str, Value], measure: str) -> dict[str, Value]:
    """Returns the values of `validation/<source>/<measure>`, by source."""
    head, tail = "validation/", f"/{measure}"
    return {
        name[len(head) : -len(tail)]: value
        for name, value in values.items()
        if name.startswith(head) and name.endswith(tail) and len(name) > len(head + tail)
    }


def iterate_metrics(path: Path | str) -> Iterator[dict[str, Any]]:
    """The records one by one: a long run's file needn't fit in memory."""
    return (record for _, record in read_lines(Path(path)))


def iterate_numbers(path: Path | str) -> Iterator[dict[str, Any]]:
    """The records one by one without their expert loads, which are nearly all of a large file."""
    return (record for record, _ in records_without_loads(Path(path)))


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """All whole records of a metrics file, in order; a torn last line is not one of them."""
    return list(iterate_metrics(path))


class FinalLoss:
    """The mean training loss over the last tenth of the steps, or the last record's.

    A record has the mean since the one before it, and counts by the tokens since then.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._steps, self._losses, self._weights = array("d"), array("d"), array("d")

    def add(self, record: Record) -> None:
        """Takes the next record."""
        before, self._tokens = self._tokens, record.get("train/tokens") or self._tokens
        step, loss = record.get("step"), record.get("train/cross_entropy")
        if isinstance(step, (int, float)) and isinstance(loss, (int, float)):
            self._steps.append(step)
            self._losses.append(loss)
            self._weights.append(max(1.0, self._tokens - before))

    @property
    def value(self) -> float | None:
        """The loss of the records so far; None where none of them has one."""
        if not self._steps:
            return None
        first = (1 - LAST_PART) * self._steps[-1]
        last = [n for n, step in enumerate(self._steps) if step > first]
        weight = sum(self._weights[n] for n in last)
        return sum(self._losses[n] * self._weights[n] for n in last) / weight


def final_loss(records: Iterable[Record]) -> float | None:
    """Returns the `FinalLoss` of records."""
    loss = FinalLoss()
    for record in records:
        loss.add(record)
    return loss.value


def _step_of(record: Mapping[str, Any]) -> float:
    step = record.get("step")
    # A line without a step isn't ours; infinity drops it at every rewind.
    return step if isinstance(step, (int, float)) else float("inf")
