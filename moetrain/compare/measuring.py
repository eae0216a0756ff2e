"""Which value of a run counts: at its end, or where all runs have come to.

Owns the points at which runs can be compared, and what a run had cost there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetrain.checks import ConfigError, nearest
from moetrain.compare.arms import Arm
from moetrain.compare.run_results import AXES, TRAINING_LOSS, RunResults

END, COMMON_POINT = "end", "common"
EQUAL_WITHIN = 0.01
"""Counts that differ by less are called equal: heads and experts come in multiples."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where runs are compared: at their end, or where each has come so far along an axis."""

    axis: str
    value: float | None
    """None: at the end, or as far as all of them have come."""
    is_common: bool = False

    @property
    def is_end(self) -> bool:
        """Whether each run is judged by its end."""
        return self.value is None and not self.is_common


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run's value, and the step that it was measured at."""

    run: RunResults
    value: float
    step: float


def point_of(at: str, axis: str) -> Point:
    """Returns what `at` and `x` say; raises ConfigError for anything else."""
    if axis not in AXES:
        raise ConfigError("x", axis, f"must be one of {', '.join(AXES)}{nearest(axis, AXES)}")
    if at == END:
        return Point(axis="step", value=None)
    if at == COMMON_POINT:
        return Point(axis=axis, value=None, is_common=True)
    along, _, text = at.rpartition(":")
    try:
        value = float(text.replace(",", "").replace("_", ""))
        if (along or axis) in AXES and value > 0:
            return Point(axis=along or axis, value=value)
    except ValueError:
        pass
    forms = ", ".join(f"{name}:NUMBER" for name in AXES)
    raise ConfigError("at", at, f"must be end, common, or one of {forms}")


def as_far_as_all(arms: Sequence[Arm], measure: str, axis: str) -> float:
    """Returns how far along an axis all runs were measured."""
    ends = []
    for arm in arms:
        for run in arm.runs:
            along = run.along(axis)
            if not along:
                raise ConfigError("x", axis, f"{run.name} has no record of its {AXES[axis]}")
            ends.append(float(np.interp(run.series[measure].steps[-1], along.steps, along.values)))
    return min(ends)


def measured_at(run: RunResults, measure: str, point: Point) -> Measured | str:
    """Returns a run's value at a point, or why it has none."""
    series = run.series.get(measure)
    if series is None or not series:
        return f"has no {measure}"
    if point.value is None:
        if measure == TRAINING_LOSS and run.final_loss is not None:
            return Measured(run=run, value=run.final_loss, step=float(series.steps[-1]))
        return Measured(run=run, value=series.last, step=float(series.steps[-1]))
    along, reached = run.along(point.axis), run.reached(point.axis)
    if reached is None or not reached >= point.value * (1 - EQUAL_WITHIN):
        far = "no record of it" if reached is None else f"{reached:.6g} only"
        return f"has not come to {point.axis} {point.value:.6g}: {far}"
    where = np.interp(series.steps, along.steps, along.values)
    before = np.flatnonzero(where <= point.value * (1 + 1e-9))
    if not len(before):
        return f"has no {measure} by {point.axis} {point.value:.6g}"
    at = int(before[-1])
    return Measured(run=run, value=float(series.values[at]), step=float(series.steps[at]))


def costs_of(values: Sequence[Measured]) -> dict[str, float]:
    """Returns what runs cost up to where they were measured, and their size: means over them."""
    found: dict[str, list[float]] = {}
    for one in values:
        run = one.run
        costs = {"steps": one.step}
        for axis, name in (("tokens", "tokens"), ("flops", "training FLOPs")):
            along = run.along(axis)
            if along and np.isfinite(along.last):
                costs[name] = float(np.interp(one.step, along.steps, along.values))
        names = {"parameters": "parameters", "active_parameters": "active parameters",
                 "flops_per_token": "FLOPs a token"}  # fmt: skip
        costs |= {names[key]: value for key, value in run.counts.items()}
        for name, value in costs.items():
            found.setdefault(name, []).append(value)
    return {n: float(np.mean(each)) for n, each in found.items() if len(each) == len(values)}
