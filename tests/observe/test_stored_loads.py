"""Records of many experts: what is read of them, by a report and at the end of a run."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch.closing import closing_lines
from moetrain.observe import (
    EXPERT_LOAD,
    MetricsFile,
    expert_load,
    final_loss,
    iterate_numbers,
    read_load,
    read_metrics,
    records_without_loads,
)
from moetrain.report.run_record import MAX_LOAD_RECORDS, read_run
from moetrain.train.control import Outcome
from tests.report.synthetic_run import write_run
from tests.support.runs import tiny_config

ODD_LINES = [
    '{"step": 1, "router/expert_load": [[0.25, null], [1, 2e-3]], "b": 2}',
    '{"router/expert_load": [[0.5, 0.5]], "step": 2}',
    '{"step": 3, "router/expert_load":[[0.25,0.75]], "b": null}',
    '{"step": 4, "router/expert_load": [[ 0.25 , 0.75 ] , [ 1, 2 ]]}',
    '{"step": 5, "router/expert_load": [[0.5, 0.5], [0.5]]}',
    '{"step": 6, "router/expert_load": [[]]}',
    '{"step": 7, "router/expert_load": []}',
    '{"step": 8, "router/expert_load": null}',
    '{"step": 9, "router/expert_load": [["0.5", "0.5"]]}',
    '{"step": 10, "router/expert_load": [[[0.5, 0.5]]]}',
    '{"step": 11, "router/expert_load": [[0.5, 0.5]',
    '{"step": 12, "text": "\\"router/expert_load\\": [[1, 2]]", "b": 3}',
    '{"step": 13, "nested": {"router/expert_load": [[0.5, 0.5]]}, "b": 4}',
    '{"step": 14, "router/expert_load": [[9, 9]], "router/expert_load": [[0.5, 0.5]]}',
    '{"step": 15, "router/expert_load": [[0.5, 0.5]], "router/expert_load": "\\u0000"}',
    "[1]",
    "",
    '{"step": 16, "router/expert_load": [[true, false]]}',
    '{"step": 17}',
    '{"step": 18, "router/expert_load": [[0.5, 0.5]]} torn {"step": 19}',
    '{"step": 20, "router/expert_load": [[0.5, 0.5]]',
]


def test_what_is_read_without_the_loads_and_later_with_them_is_what_is_there(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(ODD_LINES))
    wholes, found = read_metrics(path), list(records_without_loads(path))
    assert len(wholes) == 16
    for whole, (record, stored) in zip(wholes, found, strict=True):
        loads = expert_load(whole)
        assert record == {name: value for name, value in whole.items() if name != EXPERT_LOAD}
        ours = None if stored is None else read_load(path, stored)
        assert (ours is None) == (loads is None), whole
        if stored is not None and loads is not None:
            assert stored.shape == loads.shape
            assert np.array_equal(loads, ours, equal_nan=True)  # type: ignore[arg-type]  # None equals nothing
    assert list(iterate_numbers(path)) == [record for record, _ in found]


def plainly_read(metrics: Path) -> tuple[dict[str, dict[float, float]], dict[float, Any]]:
    """Returns the points of each metric and the loads of a shape, from whole records."""
    points: dict[str, dict[float, float]] = {}
    loads: dict[float, Any] = {}
    for record in read_metrics(metrics):
        for name, value in record.items():
            if isinstance(value, (int, float)):
                points.setdefault(name, {})[record["step"]] = float(value)
        if (found := expert_load(record)) is not None:
            loads[record["step"]] = found
    shape = loads[max(loads)].shape
    return points, {step: found for step, found in loads.items() if found.shape == shape}


@pytest.mark.parametrize("num_records", [3, 500])
def test_a_report_shows_the_same_figures_whatever_it_skips(
    tmp_path: Path, num_records: int
) -> None:
    run = write_run(tmp_path / "run", num_records=num_records, num_experts=16)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    again = [line.replace('"router/entropy": ', '"router/entropy": 1') for line in lines[1:3]]
    other = '{"step": 15, "router/expert_load": [[0.5, 0.5]]}'
    metrics.write_text("\n".join([*lines[:2], other, *again, *lines[2:]]) + "\n")
    points, loads = plainly_read(metrics)
    record = read_run(run)
    assert record.series.keys() == points.keys()
    for name, values in points.items():
        series = record.get(name)
        assert dict(zip(series.steps, series.values, strict=True)) == values
        assert list(series.steps) == sorted(values)
    assert record.final_loss == final_loss(read_metrics(metrics))
    steps = sorted(loads)
    chosen = np.unique(np.linspace(0, len(steps) - 1, MAX_LOAD_RECORDS).round().astype(int))
    assert record.expert_loads is not None
    assert list(record.expert_loads.steps) == [steps[n] for n in chosen]
    shown = np.stack([loads[steps[n]] for n in chosen]).astype(np.float32)
    assert np.array_equal(record.expert_loads.loads, shown)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the texts that have been parsed as JSON."""
    sizes: list[int] = []
    decode = json.JSONDecoder.decode

    def counting(decoder: json.JSONDecoder, text: str) -> Any:
        sizes.append(len(text))
        return decode(decoder, text)

    monkeypatch.setattr(json.JSONDecoder, "decode", counting)
    return sizes


def close(run: Path, tmp_path: Path) -> list[str]:
    config = tiny_config(tmp_path, shards=tmp_path)
    shards: Any = SimpleNamespace(baselines={})
    outcome = Outcome(finished=True, step=8, last={"b": 1})
    return list(closing_lines(config, outcome, shards, run))


def test_a_report_parses_the_loads_that_it_shows_and_the_end_of_a_run_none(
    tmp_path: Path, parsed: list[int]
) -> None:
    run = write_run(tmp_path / "run", num_records=300, num_layers=6, num_experts=64)
    size = (run / "metrics.jsonl").stat().st_size
    parsed.clear()
    lines = close(run, tmp_path)
    assert any("nats/token" in line for line in lines)
    assert sum(parsed) < size / 5
    parsed.clear()
    assert read_run(run).expert_loads is not None
    assert sum(n > size / 300 / 2 for n in parsed) == MAX_LOAD_RECORDS


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_grows_by_the_numbers_of_a_record_and_not_by_its_loads(tmp_path: Path) -> None:
    few, many = (
        write_run(tmp_path / str(number), num_records=number, num_layers=6, num_experts=64)
        for number in (300, 900)
    )
    for run in (few, many):  # imports and keeps what it needs
        read_run(run)
        close(run, tmp_path)
    for work in (read_run, lambda run: close(run, tmp_path)):
        more = peak_of(lambda work=work: work(many)) - peak_of(lambda work=work: work(few))  # type: ignore[misc]  # a lambda's default
        assert more / 600 < 1000, "a record's loads are 3 kB as numbers, and 20 kB as objects"


def test_nothing_is_copied_where_a_resume_removes_no_record(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_records=20)
    metrics = MetricsFile(run / "metrics.jsonl")
    inode, content = metrics.path.stat().st_ino, metrics.path.read_bytes()
    metrics.rewind(200)
    assert (metrics.path.stat().st_ino, metrics.path.read_bytes()) == (inode, content)
    metrics.path.write_bytes(content + b'{"step": 2')
    metrics.rewind(200)
    assert metrics.path.read_bytes() == content
    metrics.rewind(199)
    assert metrics.path.read_bytes() == content[: content.rindex(b"{")]
