"""One run as a comparison needs it: settings, counts, results and a few curves, read once.

Owns what separates arms and what is a seed. A metrics file is streamed, and only the curves that
are asked for are kept.
"""

import re
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.checkpoint.trained import trained
from moetrain.checks import ConfigError
from moetrain.compare.finding import FoundRun
from moetrain.observe import (
    FinalLoss,
    has_finished,
    model_event,
    read_events,
    records_without_loads,
)
from moetrain.redaction import redacted
from moetrain.report.run_record import Floats, Series, series_of, state_of
from moetrain.train.changes import Kind, as_typed_value, default_settings, kind_of, leaves

TRAINING_LOSS = "train/cross_entropy"
VALIDATION_LOSS = "validation/loss"
TOKENS, STEP_SECONDS, FLOPS = "train/tokens", "perf/step_seconds", "train/flops"
AXES = {"step": "step", "tokens": "tokens", "flops": "FLOPs", "time": "seconds of training"}
COUNTS = ("parameters", "active_parameters", "flops_per_token")
_SEPARATES = (Kind.function, Kind.order, Kind.recipe)
_WHERE_TEXT_IS = ("data.dir", "data.corpus", "data.tokenizer", "data.text_field")


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """What a run was trained with, and what came of it."""

    path: Path
    name: str
    varied: Mapping[str, str] | None
    state: str
    reason: str | None
    settings: Mapping[str, Any]
    """By name, defaults included."""
    earlier: Mapping[str, Any]
    """The first values of settings that a resume changed."""
    text: str
    """The fingerprint of its shards; what its settings say of them where no checkpoint has it."""
    counts: Mapping[str, float]
    series: Mapping[str, Series]
    """The curves that were asked for, by metric."""
    last: Mapping[str, float]
    """The last finite value of every metric that is a number."""
    final_loss: float | None
    """Of training, over the last tenth of the steps."""
    num_skipped: int
    """Damaged lines of its metrics."""

    @property
    def is_finished(self) -> bool:
        """Whether all of its steps are done."""
        return self.state == "finished"

    @property
    def seeds(self) -> tuple[tuple[str, Any], ...]:
        """The values of its seeds, by setting."""
        return tuple(
            (name, value)
            for name, value in sorted(self.settings.items())
            if is_seed(name) and value is not None
        )

    @property
    def order(self) -> tuple[Any, ...]:
        """What decides, beside the seeds, which text it reads when; equal runs read the same."""
        settings = (
            (name, as_typed_value(value))
            for name, value in sorted(self.settings.items())
            if not is_seed(name)
            and (
                kind_of(name) is Kind.order
                or (name.startswith("data.") and kind_of(name) is Kind.recipe)
            )
        )
        return self.text, *settings

    def separating(self) -> dict[str, Any]:
        """Returns the settings that make runs another arm where they differ."""
        found: dict[str, Any] = {
            name: value
            for name, value in self.settings.items()
            if kind_of(name) in _SEPARATES and not is_seed(name)
        }
        for name, value in self.earlier.items():
            if name in found and value != found[name]:
                found[name] = f"{as_typed_value(value)} → {as_typed_value(found[name])}"
        return found | {"data (its text)": self.text}

    def along(self, axis: str) -> Series:
        """Returns how far the run was at each of its records: in steps, tokens, FLOPs, seconds."""
        steps = self.series["step"]
        if axis == "step":
            return steps
        if axis == "time":
            return _elapsed(steps.steps, self.series.get(STEP_SECONDS))
        if axis == "flops" and FLOPS in self.series:
            return self.series[FLOPS]
        tokens = self.series.get(TOKENS, Series(steps=np.empty(0), values=np.empty(0)))
        if axis == "tokens":
            return tokens
        each = self.counts.get("flops_per_token")
        return replace(tokens, values=tokens.values * (np.nan if each is None else each))

    def reached(self, axis: str) -> float | None:
        """Returns how far the run is in all; None where its record doesn't say."""
        there = self.along(axis)
        return there.last if there and np.isfinite(there.last) else None


def is_seed(name: str) -> bool:
    """Returns whether a setting only draws other random numbers."""
    *groups, last = name.split(".")
    return last == "seed" or last.endswith("_seed") or "seeds" in groups


def read_results(found: FoundRun, *, keeps: Callable[[str], bool]) -> RunResults:
    """Reads a run; `keeps` says which metrics' curves are kept beside those of the axes.

    Raises ConfigError where nothing can be said of it, and OSError where it can't be read.
    """
    run = trained(found.path)
    if run is None or not run.settings:
        why = "has no config.yaml and no checkpoint" if run is None else "has settings that "
        raise ConfigError(
            "runs", found.path, why if run is None else f"{why}can't be read: config.yaml is broken"
        )
    given = dict(leaves(redacted(dict(run.settings))))  # in the configuration's order
    settings = given | {k: v for k, v in default_settings().items() if k not in given}
    events = read_events(found.path / "events.jsonl")
    state, reason = state_of(events)
    if state == "finished" and not has_finished(events):
        state = "unknown"
    damaged: list[int] = []
    metrics = _read(found.path / "metrics.jsonl", keeps=keeps, skipped=damaged.append)
    model = model_event(events)
    return RunResults(
        path=found.path,
        name=found.path.resolve().name,
        varied=found.varied,
        state=state,
        reason=reason,
        settings=settings,
        earlier=run.earlier,
        text=run.text or _where(settings),
        counts={k: v for k in COUNTS if isinstance(v := model.get(k), (int, float))},
        series=metrics.series,
        last=metrics.last,
        final_loss=metrics.final_loss,
        num_skipped=len(damaged),
    )


def with_known_texts(runs: list[RunResults]) -> list[RunResults]:
    """Returns the runs; one without a checkpoint has the text of others with its settings."""
    known = {_where(run.settings): run.text for run in runs if run.text != _where(run.settings)}
    return [replace(run, text=known.get(run.text, run.text)) for run in runs]


def _where(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={as_typed_value(settings.get(name))}" for name in _WHERE_TEXT_IS)


@dataclass(frozen=True, kw_only=True)
class _Metrics:
    series: dict[str, Series]
    last: dict[str, float]
    final_loss: float | None


def _read(
    path: Path, *, keeps: Callable[[str], bool], skipped: Callable[[int], object]
) -> _Metrics:
    axes = {"step", TOKENS, STEP_SECONDS, FLOPS}
    points: dict[str, tuple[array[float], array[float]]] = {}
    last: dict[str, tuple[float, float]] = {}
    loss = FinalLoss()
    for record, _ in records_without_loads(path, skipped=skipped):
        loss.add(record)
        step = record.get("step")
        if not isinstance(step, (int, float)):
            continue
        for name, value in record.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if name not in last or last[name][0] <= step:
                last[name] = step, value
            if name in axes or keeps(name):
                if name not in points:
                    points[name] = array("d"), array("d")
                points[name][0].append(step)
                points[name][1].append(value)
    nothing = Series(steps=np.empty(0), values=np.empty(0))
    series = {"step": nothing} | {name: series_of(*arrays) for name, arrays in points.items()}
    ends = {name: value for name, (_, value) in last.items()}
    return _Metrics(series=series, last=ends, final_loss=loss.value)


def _elapsed(steps: Floats, seconds: Series | None) -> Series:
    """Returns the time that the steps took, without starts, validation and saving."""
    if seconds is None or not seconds or not len(steps):
        return Series(steps=np.empty(0), values=np.empty(0))
    each = np.interp(steps, seconds.steps, seconds.values)
    return Series(steps=steps, values=np.cumsum(np.diff(steps, prepend=0.0) * each))


def measure_pattern(measure: str) -> re.Pattern[str]:
    """Returns what `head/<source>/tail` must look like for a measure `head/tail`."""
    head, _, tail = measure.partition("/")
    tails = [re.escape(tail)]
    if measure == VALIDATION_LOSS:
        tails.append("bits_per_byte")
    return re.compile(f"{re.escape(head)}/(?P<source>.+)/(?P<tail>{'|'.join(tails)})")
