"""A run folder read into memory, as much of it as a report shows.

Owns merging the metrics into one series for each name, thinning long series, and deriving a run's
state from its events. Leaves drawing to figures.py and words to page.py.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from moetrain.kinds import EventKind
from moetrain.observe import (
    Account,
    FinalLoss,
    StoredLoad,
    account,
    baselines_by_source,
    by_source,
    model_event,
    read_events,
    read_load,
    read_sign,
    records_without_loads,
)
from moetrain.redaction import redacted_text

Floats = NDArray[np.float64]

# More columns than this can't be told apart in a figure; fewer keep a 32 × 64-expert file small.
MAX_LOAD_RECORDS = 160

# A run's state by its last event of these kinds.
_STATES: dict[str, str] = {
    EventKind.start: "running",
    EventKind.restart: "running",
    EventKind.resume: "running",
    EventKind.failure: "failed",
    EventKind.fail: "failed",
    EventKind.stop: "stopped",
    EventKind.finish: "finished",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric over the steps at which it was finite."""

    steps: Floats  # [records]
    values: Floats  # [records]

    def __bool__(self) -> bool:
        return len(self.steps) > 0

    @property
    def last(self) -> float:
        """The newest value; the series must not be empty."""
        return float(self.values[-1])


@dataclass(frozen=True, kw_only=True)
class ExpertLoads:
    """The share of each layer's tokens that went to each expert, at evenly chosen records."""

    steps: Floats  # [records]
    loads: NDArray[np.float32]  # [records, layers, experts], NaN where nothing was logged
    layers: tuple[int, ...]  # the layers' own numbers; dense layers have no experts

    @property
    def num_experts(self) -> int:
        """Experts a layer."""
        return int(self.loads.shape[2])


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything that a report knows of one run."""

    name: str
    state: str
    reason: str | None
    config_text: str
    num_steps: int | None  # asked for by the configuration
    series: Mapping[str, Series]
    final_loss: float | None  # of training, over the last tenth of the steps
    expert_loads: ExpertLoads | None
    events: list[dict[str, Any]]
    account: Account | None  # the account of its time; None if unknown
    baselines: Mapping[str, Mapping[str, float]]  # baselines, by source and name

    @property
    def model(self) -> Mapping[str, Any]:
        """The counts of the model: parameters, active ones, FLOPs a token; empty if unknown."""
        return model_event(self.events)

    def get(self, name: str) -> Series:
        """The series of a metric; an empty one where it was never logged."""
        nothing = np.empty(0)
        return self.series.get(name, Series(steps=nothing, values=nothing))

    def by_source(self, measure: str) -> dict[str, Series]:
        """The series of `validation/<source>/<measure>` by source."""
        return by_source(self.series, measure)


def is_run_dir(path: Path) -> bool:
    """Whether a folder holds a run: its configuration, or at least its metrics."""
    return (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file()


def read_run(run_dir: Path) -> RunRecord:
    """Reads whatever a run has; records of one step are joined, and the later value wins."""
    config_path = run_dir / "config.yaml"
    config_text = config_path.read_text(errors="replace") if config_path.is_file() else ""
    config_text = redacted_text(config_text)  # of an older version that saved it unresolved
    config = _parsed(config_text)
    events = read_events(run_dir / "events.jsonl")
    state, reason = state_of(events)
    metrics = _read_metrics(run_dir / "metrics.jsonl")
    first_layer = _whole(_at(config, "model", "num_dense_layers")) or 0
    return RunRecord(
        name=str(_at(config, "run", "name") or run_dir.resolve().name),
        state=state,
        reason=reason,
        config_text=config_text,
        num_steps=_whole(_at(config, "train", "num_steps")),
        series=metrics.series,
        final_loss=metrics.final_loss,
        expert_loads=_expert_loads(
            run_dir / "metrics.jsonl", metrics.loads, first_layer=first_layer
        ),
        events=events,
        account=account(events, sign=read_sign(run_dir)),
        baselines=baselines_by_source(events),
    )


class _Metrics(NamedTuple):
    """A metrics file, read once; its loads are left in the file until it is known which to show."""

    series: dict[str, Series]
    final_loss: float | None
    loads: dict[float, StoredLoad]


def _read_metrics(path: Path) -> _Metrics:
    points: dict[str, tuple[array[float], array[float]]] = {}
    loads: dict[float, StoredLoad] = {}
    loss = FinalLoss()
    for record, stored in records_without_loads(path):
        loss.add(record)
        step = record.get("step")
        if not isinstance(step, (int, float)):
            continue
        if stored is not None:
            loads[float(step)] = stored
        for name, value in record.items():
            if isinstance(value, (int, float)):
                if name not in points:
                    points[name] = array("d"), array("d")
                points[name][0].append(step)
                points[name][1].append(value)
    series = {name: series_of(*arrays) for name, arrays in points.items()}
    return _Metrics(series, loss.value, loads)


def series_of(steps: "array[float]", values: "array[float]") -> Series:
    """Returns a series in the order of steps; of several values at one, the last counts."""
    found, last = np.unique(np.array(steps)[::-1], return_index=True)
    return Series(steps=found, values=np.array(values)[::-1][last])


def _expert_loads(
    metrics: Path, found: Mapping[float, StoredLoad], *, first_layer: int
) -> ExpertLoads | None:
    """Reads the loads that are shown: those of evenly chosen records."""
    if not found:
        return None
    shape = found[max(found)].shape
    logged = sorted(step for step, stored in found.items() if stored.shape == shape)
    chosen = np.unique(np.linspace(0, len(logged) - 1, MAX_LOAD_RECORDS).round().astype(int))
    rows = {}
    for step in (logged[i] for i in chosen):
        loads = read_load(metrics, found[step])
        if loads is not None and loads.shape == shape:
            rows[step] = loads.astype(np.float32)
    if not rows:
        return None
    return ExpertLoads(
        steps=np.array(sorted(rows)),
        loads=np.stack([rows[step] for step in sorted(rows)]),
        layers=tuple(range(first_layer, first_layer + shape[0])),
    )


def state_of(events: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Returns the state of a run with these events, and the reason that the last of them gives."""
    for event in reversed(events):
        if state := _STATES.get(str(event.get("event"))):
            reason = event.get("reason")
            return state, None if reason is None else str(reason)
    return "unknown", None


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None  # shown as it is all the same


def _at(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None
