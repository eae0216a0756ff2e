"""`moetrain report run=DIR`: writes the report of a run and prints its path.

Owns the command's settings and its messages. Leaves composing the settings to `command.py`.
"""

import difflib
import sys
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from data_pipeline.settings import PathText
from moetrain.command import run_command
from moetrain.exit_codes import BAD_CONFIGURATION, DONE, FAILED
from moetrain.report.page import render_report
from moetrain.report.run_record import is_run_dir

MAX_NAMED_RUNS = 8


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ReportSettings:
    """Which run to report on."""

    run: PathText  # the run's own folder


def main(settings: ReportSettings) -> int:
    """Writes `report.html` into the run folder; returns the exit code."""
    run_dir = Path(settings.run)
    if not is_run_dir(run_dir):
        print(_no_run(run_dir), file=sys.stderr)
        return BAD_CONFIGURATION
    try:
        print(render_report(run_dir))
    except OSError as error:
        print(f"the report of {run_dir} could not be written: {error}", file=sys.stderr)
        return FAILED
    return DONE


def _no_run(run_dir: Path) -> str:
    """Returns why a folder has no run, and which runs exist: in it, or else beside it."""
    why = (
        "has neither config.yaml nor metrics.jsonl" if run_dir.is_dir() else "is not a run's folder"
    )
    runs = _runs_in(run_dir) or _runs_in(run_dir.absolute().parent)
    if not runs:
        return f"run={run_dir}: it {why}, and there are no runs beside it"
    close = difflib.get_close_matches(run_dir.name, [run.name for run in runs], n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    named = ", ".join(run.name for run in runs[:MAX_NAMED_RUNS])
    more = f" and {len(runs) - MAX_NAMED_RUNS} more" if len(runs) > MAX_NAMED_RUNS else ""
    return f"run={run_dir}: it {why}.{meant} Runs in {runs[0].parent}: {named}{more}"


def _runs_in(folder: Path) -> list[Path]:
    """Returns the run folders in a folder, the newest first."""
    if not folder.is_dir():
        return []
    runs = [path for path in folder.iterdir() if path.is_dir() and is_run_dir(path)]
    return sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)


if __name__ == "__main__":
    run_command(main, tree=ReportSettings, module="moetrain.report")
