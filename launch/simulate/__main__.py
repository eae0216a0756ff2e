"""`moetrain simulate`: effective training time by number of nodes, and how often to checkpoint.

Owns the command and its output. Leaves the arithmetic to `expected.py` and the simulation that
checks it to `discrete_events.py`.
"""

import json
import sys
from dataclasses import asdict, dataclass

from data_pipeline.quantities import rounded_duration
from launch.simulate.discrete_events import Sample, fitting_failures, simulate
from launch.simulate.expected import (
    Shares,
    best_interval,
    failure_rate,
    longest_restart,
    shares,
)
from launch.simulate.settings import SimulateSettings, check
from moetrain.command import run_command
from moetrain.exit_codes import DONE, FAILED

STANDARD_ERRORS = 4  # a correct row exceeds this once in 16,000


@dataclass(frozen=True, kw_only=True)
class Row:
    """The expected figures for a number of nodes, and the simulated ones."""

    nodes: int
    interval: float
    shares: Shares
    best: float
    """The best interval, whichever was asked for."""
    at_best: float
    """The effective training time with the best interval."""
    longest_restart: float | None
    sample: Sample | None

    @property
    def differs(self) -> bool:
        """Whether the simulation contradicts the expected figures."""
        return self.sample is not None and self.sample.worst_error(self.shares) > STANDARD_ERRORS


def main(settings: SimulateSettings) -> int:
    """Prints a row for each number of nodes; returns 1 if a simulated one differs."""
    check(settings)
    rows = [row(settings, nodes=nodes) for nodes in settings.nodes]
    print(as_json(settings, rows) if settings.format == "json" else as_text(settings, rows))
    return FAILED if any(row.differs for row in rows) else DONE


def row(settings: SimulateSettings, *, nodes: int) -> Row:
    """Computes a row, and simulates it if asked."""
    best = best_interval(settings, nodes=nodes)
    interval = settings.interval_seconds or best
    if settings.interval_seconds and settings.step_seconds:
        # Rounded up: a shorter one might begin a save before the last is over.
        interval = -(-interval // settings.step_seconds) * settings.step_seconds
    sample = None
    if settings.check:
        if sys.stderr.isatty():
            print(f"\r\x1b[2Ksimulating {nodes:,} nodes …\r", end="", file=sys.stderr)
        failures = fitting_failures(settings, nodes=nodes, interval=interval)
        if failures is not None:
            sample = simulate(
                settings, nodes=nodes, interval=interval, failures=failures, seed=settings.seed
            )
    return Row(
        nodes=nodes,
        interval=interval,
        shares=shares(settings, nodes=nodes, interval=interval),
        best=best,
        at_best=shares(settings, nodes=nodes, interval=best).effective,
        longest_restart=longest_restart(settings, nodes=nodes, interval=interval),
        sample=sample,
    )


def as_json(settings: SimulateSettings, rows: list[Row]) -> str:
    """Returns settings and rows as JSON; times are in seconds, shares parts of one."""
    described = [
        {
            "nodes": row.nodes,
            "gpus": row.nodes * settings.gpus_per_node,
            "seconds_between_failures": 1 / failure_rate(settings, nodes=row.nodes),
            "interval_seconds": row.interval,
            "interval_steps": _steps(settings, row.interval),
            "shares": asdict(row.shares),
            "best_interval_seconds": row.best,
            "best_effective": row.at_best,
            "longest_restart_seconds": row.longest_restart,
            "simulated": asdict(row.sample) | {"differs": row.differs} if row.sample else None,
        }
        for row in rows
    ]
    return json.dumps({"settings": asdict(settings), "rows": described}, indent=1)


def as_text(settings: SimulateSettings, rows: list[Row]) -> str:
    """Returns the settings and the rows as a table."""
    given = (
        f"failures   {settings.failures_per_1000_node_days:g} per 1,000 node-days, detected in "
        f"{rounded_duration(settings.detect_seconds)}"
    )
    if settings.hang_share:
        given += (
            f", {settings.hang_share:.1%} of them hangs, detected in "
            f"{rounded_duration(settings.hang_detect_seconds)}"
        )
    given += (
        f"; training again {rounded_duration(settings.restart_seconds)} later\n"
        f"saves      training waits {rounded_duration(settings.save_seconds)}; safe "
        f"{rounded_duration(settings.durable_seconds)} after the beginning\n"
        f"target     {settings.target:.4g} of all time; the longest restart that allows it is in "
        "the table"
    )
    head = ["nodes", "GPUs", "failure every", "save every"]
    head += ["in steps"] if settings.step_seconds else []
    head += ["effective", "saving", "detecting", "restarting", "redoing"]
    head += ["restart up to"]
    head += ["best: every", "effective"] if settings.interval_seconds else []
    head += ["simulated", f"± {STANDARD_ERRORS} errors", "failures"] if settings.check else []
    cells = [head, *(_cells(settings, row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "─" * len(lines[0]))
    if any(row.differs for row in rows):
        lines.append(
            f"! more than {STANDARD_ERRORS} standard errors between what was simulated and what "
            "was expected"
        )
    if settings.check and any(row.sample is None for row in rows):
        lines.append("– not simulated: too many saves between two failures")
    return "\n".join([given, "", *lines])


def _cells(settings: SimulateSettings, row: Row) -> list[str]:
    cells = [
        f"{row.nodes:,}",
        f"{row.nodes * settings.gpus_per_node:,}",
        rounded_duration(1 / failure_rate(settings, nodes=row.nodes)),
        rounded_duration(row.interval),
    ]
    if settings.step_seconds:
        cells.append(f"{_steps(settings, row.interval):,}")
    cells += [f"{share:.2%}" for share in asdict(row.shares).values()]
    cells.append("none" if row.longest_restart is None else rounded_duration(row.longest_restart))
    if settings.interval_seconds:
        cells += [rounded_duration(row.best), f"{row.at_best:.2%}"]
    if settings.check and row.sample is None:
        cells += ["–"] * 3
    elif row.sample is not None:
        error = STANDARD_ERRORS * row.sample.standard_errors.effective
        mark = " !" if row.differs else ""
        cells += [
            f"{row.sample.shares.effective:.2%}{mark}", f"{error:.2%}", f"{row.sample.failures:,}"
        ]  # fmt: skip
    return cells


def _steps(settings: SimulateSettings, interval: float) -> int | None:
    return None if settings.step_seconds is None else round(interval / settings.step_seconds)


if __name__ == "__main__":
    run_command(main, tree=SimulateSettings, module="launch.simulate")
