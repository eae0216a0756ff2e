"""runs.csv and records.csv, and the same as Parquet: a row a run and a row a record, for pandas.

Owns the columns. Metrics are read once more for the records, a run at a time, so that no run must
fit into memory. Parquet is written by pyarrow, which is an extra.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.atomic_files import new_file
from moetrain.compare.arms import seed_label
from moetrain.compare.comparison import Comparison
from moetrain.compare.run_results import AXES, RunResults
from moetrain.observe import numbers_of, records_without_loads
from moetrain.train.changes import as_typed_value

_ROWS_AT_ONCE = 10_000
_OF_RECORD = ("run", "arm", "seeds")


def write_tables(comparison: Comparison, folder: Path, *, records: bool = True) -> Iterator[str]:
    """Writes the tables into a folder, each whole or not at all; yields what to say of each.

    Raises OSError where one can't be written.
    """
    rows = run_rows(comparison)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    yield str(_write_csv(folder / "runs.csv", columns, rows))
    names = list(dict.fromkeys(name for run in comparison.runs for name in run.last))
    fields = [*_OF_RECORD, "step", *(name for name in names if name != "step")]
    if records:
        yield str(_write_csv(folder / "records.csv", fields, record_rows(comparison)))
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        yield "no Parquet without pyarrow: pip install 'moetrain[corpora]'"
        return
    texts = {c for c in columns if any(isinstance(row.get(c), str) for row in rows)}
    yield str(_write_parquet(folder / "runs.parquet", columns, rows, texts=texts, arrow=pyarrow))
    if records:
        path = folder / "records.parquet"
        found = record_rows(comparison)
        yield str(_write_parquet(path, fields, found, texts=set(_OF_RECORD), arrow=pyarrow))


def run_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns a row for each run: name, arm, state, counts, results and all settings."""
    values = {
        value.run.path: (result.arm.name, value)
        for result in comparison.main.results
        for value in result.values
    }
    rows = []
    for run in comparison.runs:
        arm, measured = values.get(run.path, (None, None))
        row: dict[str, Any] = {
            "run": run.name,
            "folder": str(run.path),
            "arm": arm,
            "seeds": seed_label(run),
            "state": run.state,
            "value": measured.value if measured else None,
            "value_at_step": measured.step if measured else None,
            **{f"reached_{axis}": run.reached(axis) for axis in AXES},
            **run.counts,
            "final_training_loss": run.final_loss,
            "text": run.text,
            **{name: value for name, value in run.last.items() if name != "step"},
            **{n: _plain(value) for n, value in run.settings.items() if n != "arm"},  # as named
        }
        rows.append(row)
    return rows


def record_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yields a row for each record of each run: its arm and all numbers."""
    arms = {
        value.run.path: result.arm.name
        for result in comparison.main.results
        for value in result.values
    }
    for run in comparison.runs:
        yield from _records(run, arms.get(run.path))


def _records(run: RunResults, arm: str | None) -> Iterator[dict[str, Any]]:
    head = {"run": run.name, "arm": arm, "seeds": seed_label(run)}
    skip: list[int] = []  # said by the comparison
    for record, _ in records_without_loads(run.path / "metrics.jsonl", skipped=skip.append):
        if isinstance(record.get("step"), int | float):
            yield head | numbers_of(record)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) or value is None else as_typed_value(value)


def _write_csv(path: Path, columns: Sequence[str], rows: Any) -> Path:
    """Writes a table by RFC 4180, in UTF-8; names stand as they are, whatever they begin with."""
    with new_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        text.flush()
        text.detach()
    return path


def _write_parquet(
    path: Path,
    columns: Sequence[str],
    rows: Any,
    *,
    texts: set[str],
    arrow: Any,
) -> Path:
    """Writes a table whose columns are texts or floats, some thousands of rows at a time."""
    schema = arrow.schema(
        [(name, arrow.string() if name in texts else arrow.float64()) for name in columns]
    )
    with new_file(path) as file, arrow.parquet.ParquetWriter(file, schema) as writer:
        part: list[Mapping[str, Any]] = []
        for row in rows:
            part.append(row)
            if len(part) == _ROWS_AT_ONCE:
                writer.write_table(_arrow_table(part, schema, arrow))
                part = []
        writer.write_table(_arrow_table(part, schema, arrow))
    return path


def _arrow_table(rows: Sequence[Mapping[str, Any]], schema: Any, arrow: Any) -> Any:
    def cell(row: Mapping[str, Any], name: str, is_text: bool) -> Any:
        value = row.get(name)
        if value is None:
            return None
        if not is_text:
            return float(value)
        words = value if isinstance(value, str) else as_typed_value(value)
        return words.encode(errors="backslashreplace").decode()

    columns = [
        [cell(row, field.name, arrow.types.is_string(field.type)) for row in rows]
        for field in schema
    ]
    arrays = [arrow.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)]
    return arrow.table(arrays, schema=schema)
