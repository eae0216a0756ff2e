"""A run folder read into memory, as much of it as a report shows.

Owns merging the metrics into one series for each name, thinning long series, and deriving a run's
state from its events. Leaves drawing to figures.py and words to page.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moetrain.kinds import EventKind
from moetrain.observe import (
    Account,
    account,
    baselines_by_source,
    by_source,
    expert_load,
    final_loss,
    iterate_metrics,
    model_event,
    read_events,
    read_sign,
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
    state, reason = _state(events)
    metrics = run_dir / "metrics.jsonl"
    first_layer = _whole(_at(config, "model", "num_dense_layers")) or 0
    return RunRecord(
        name=str(_at(config, "run", "name") or run_dir.resolve().name),
        state=state,
        reason=reason,
        config_text=config_text,
        num_steps=_whole(_at(config, "train", "num_steps")),
        series=_series(metrics),
        final_loss=final_loss(iterate_metrics(metrics)),
        expert_loads=_expert_loads(metrics, first_layer=first_layer),
        events=events,
        account=account(events, sign=read_sign(run_dir)),
        baselines=baselines_by_source(events),
    )


def _series(metrics: Path) -> dict[str, Series]:
    points: dict[str, dict[float, float]] = {}
    for step, record in _steps(metrics):
        for name, value in record.items():
            if isinstance(value, (int, float)):
                points.setdefault(name, {})[step] = float(value)
    return {name: _sorted(values) for name, values in points.items()}


def _sorted(points: Mapping[float, float]) -> Series:
    steps = np.array(sorted(points), dtype=np.float64)
    return Series(steps=steps, values=np.array([points[step] for step in steps]))


def _expert_loads(metrics: Path, *, first_layer: int) -> ExpertLoads | None:
    """A second pass over the file, since only after a first is it known which records to keep."""
    shapes = {step: loads.shape for step, loads in _loads(metrics)}
    if not shapes:
        return None
    shape = shapes[max(shapes)]
    logged = sorted(step for step, found in shapes.items() if found == shape)
    chosen = np.unique(np.linspace(0, len(logged) - 1, MAX_LOAD_RECORDS).round().astype(int))
    kept = {logged[i] for i in chosen}
    rows = {step: loads for step, loads in _loads(metrics) if step in kept and loads.shape == shape}
    return ExpertLoads(
        steps=np.array(sorted(rows)),
        loads=np.stack([rows[step] for step in sorted(rows)]).astype(np.float32),
        layers=tuple(range(first_layer, first_layer + shape[0])),
    )


def _loads(metrics: Path) -> Iterator[tuple[float, Floats]]:
    for step, record in _steps(metrics):
        if (loads := expert_load(record)) is not None:
            yield step, loads


def _steps(metrics: Path) -> Iterator[tuple[float, dict[str, Any]]]:
    for record in iterate_metrics(metrics):
        step = record.get("step")
        if isinstance(step, (int, float)):
            yield float(step), record


def _state(events: list[dict[str, Any]]) -> tuple[str, str | None]:
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
