"""Reading the records of a run of 61 layers of 256 experts: a report, a run's end, a resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling.case import Case
from moetrain.observe import FinalLoss, MetricsFile, iterate_numbers
from moetrain.report import render_report

_LAYERS, _EXPERTS = 61, 256


def write_records(size: int, folder: Path) -> None:
    """Writes a run's metrics, as `metrics.jsonl` has them, from a few matrices of loads."""
    chance = np.random.default_rng(0)
    loads = [
        json.dumps(chance.dirichlet(np.full(_EXPERTS, 9.0), size=_LAYERS).tolist())
        for _ in range(8)
    ]
    numbers: dict[str, Any] = {f"perf/number_{n}": chance.random() for n in range(30)}
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, size + 1):
            loss = 2 + 5 / step
            record = {"step": step, "train/tokens": step * 4e6, "train/cross_entropy": loss}
            text = json.dumps({**record, **numbers})[:-1]
            file.write(f'{text}, "router/expert_load": {loads[step % 8]}}}\n')


def _report(size: int, folder: Path) -> None:
    render_report(folder)


def _end(size: int, folder: Path) -> None:
    """What the driver reads of the records when a run has ended."""
    loss, known = FinalLoss(), dict[str, Any]()
    for record in iterate_numbers(folder / "metrics.jsonl"):
        loss.add(record)
        known |= record
    assert loss.value is not None


CASES = (
    Case(
        name="report/records",
        unit="records",
        sizes=(100, 400, 1600),
        prepare=write_records,
        run=_report,
    ),
    Case(
        name="records/end_of_run",
        unit="records",
        sizes=(100, 400, 1600),
        prepare=write_records,
        run=_end,
    ),
    Case(
        name="records/resume",
        unit="records",
        sizes=(100, 400, 1600),
        prepare=write_records,
        run=lambda size, folder: MetricsFile(folder / "metrics.jsonl").rewind(size),
    ),
)
