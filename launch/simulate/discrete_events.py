"""A discrete-event simulation of a run on nodes that fail, to check `expected.py`.

Owns the events and the account of each second. Shares only the settings with the arithmetic that it
checks: every node fails after an exponential time, and the run goes through its phases event by
event.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from launch.simulate.expected import SECONDS_A_DAY, Shares
from launch.simulate.settings import SimulateSettings

EVENTS = 3_000_000  # simulated for a row at most, in a second or so
FEWEST = 100  # failures for a row: a standard error means little with fewer


class Failure(NamedTuple):
    """When a node fails, in seconds, and whether it only hangs."""

    at: float
    hangs: bool


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the simulation found."""

    shares: Shares
    standard_errors: Shares
    failures: int

    def worst_error(self, expected: Shares) -> float:
        """Returns by how many standard errors the worst share differs from the expected one."""
        away = 0.0
        for field in fields(Shares):
            error = getattr(self.standard_errors, field.name)
            off = abs(getattr(self.shares, field.name) - getattr(expected, field.name))
            # A share may have no spread, such as hangs when there are none: only rounding is left.
            away = max(away, off / max(error, 1e-12))
        return away


def simulate(
    settings: SimulateSettings, *, nodes: int, interval: float, failures: int, seed: int
) -> Sample:
    """Simulates a run until so many failures have occurred."""
    rng = np.random.default_rng([seed, nodes])
    times = node_failures(settings, nodes=nodes, rng=rng)
    accounts = time_spent(times, settings, interval=interval)
    next(accounts)  # the first begins with training, all others with a failure
    rows = np.array([next(accounts) for _ in range(failures)])
    # Every period between failures starts in the same state, so the rows are independent, and a
    # share is the ratio of two of their sums.
    totals = rows.sum(axis=1)
    ratios = rows.sum(axis=0) / totals.sum()
    residuals = rows - ratios * totals[:, None]
    errors = residuals.std(axis=0, ddof=1) * math.sqrt(failures) / totals.sum()
    return Sample(shares=_shares(ratios), standard_errors=_shares(errors), failures=failures)


def fitting_failures(settings: SimulateSettings, *, nodes: int, interval: float) -> int | None:
    """Returns how many failures to simulate; None if too many saves are between two of them."""
    between = SECONDS_A_DAY * 1000 / settings.failures_per_1000_node_days / nodes
    events = 3 * between / (interval + settings.save_seconds)  # between two failures
    fitting = int(EVENTS / max(events, 1.0))
    return min(settings.check_failures, fitting) if fitting >= FEWEST else None


def node_failures(
    settings: SimulateSettings, *, nodes: int, rng: np.random.Generator
) -> Iterator[Failure]:
    """Yields failures in order, without end; a failed node is replaced by one like it."""
    mean = SECONDS_A_DAY * 1000 / settings.failures_per_1000_node_days
    clocks = [float(at) for at in rng.exponential(mean, size=nodes)]
    heapq.heapify(clocks)
    while True:
        at = clocks[0]
        heapq.heapreplace(clocks, at + rng.exponential(mean))
        yield Failure(at, rng.random() < settings.hang_share)


def time_spent(
    failures: Iterable[Failure], settings: SimulateSettings, *, interval: float
) -> Iterator[tuple[float, ...]]:
    """Yields, at each failure, the seconds since the previous one, by the fields of `Shares`."""
    now = trained = safe = 0.0
    phase, ends = "training", interval
    in_flight: deque[tuple[float, float]] = deque()  # saves: when they are safe, and of what
    spent = dict.fromkeys(("training", "saving", "detecting", "restarting"), 0.0)
    for failure in failures:
        while True:
            safe_at = in_flight[0][0] if in_flight else math.inf
            at = min(ends, safe_at, failure.at)
            spent[phase] += at - now
            trained += at - now if phase == "training" else 0.0
            now = at
            if at == failure.at:
                break
            if at == safe_at:
                safe = in_flight.popleft()[1]
            elif phase == "training":
                phase, ends = "saving", now + settings.save_seconds
                in_flight.append((now + settings.durable_seconds, trained))
            elif phase == "detecting":
                phase, ends = "restarting", now + settings.restart_seconds
            else:
                phase, ends = "training", now + interval
        lost = trained - safe
        yield (
            spent["training"] - lost,
            spent["saving"],
            spent["detecting"],
            spent["restarting"],
            lost,
        )
        trained = safe
        in_flight.clear()
        spent = dict.fromkeys(spent, 0.0)
        detected = settings.hang_detect_seconds if failure.hangs else settings.detect_seconds
        phase, ends = "detecting", now + detected


def _shares(values: np.ndarray) -> Shares:
    names = [field.name for field in fields(Shares)]
    return Shares(**dict(zip(names, values.tolist(), strict=True)))
