"""The runs that are to be compared: named folders, a sweep's folder, folders of runs, patterns.

Owns which folders are meant, wherever a sweep was moved to since. Leaves what is in a run to
run_results.
"""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.checks import ConfigError, nearest
from moetrain.observe import iterate_metrics
from moetrain.report.run_record import is_run_dir

TRIALS = "trials.jsonl"
MAX_NAMED = 8
_NO_RUN = ("other settings", "bad settings")
"""Ends of trials whose folder has another run, or none."""


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A run's folder, and what its sweep called it by."""

    path: Path
    varied: Mapping[str, str] | None = None
    """The values that its sweep varied; None for a run that was found in no sweep's folder."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The runs that some words name, each once, and what is said of the rest."""

    runs: list[FoundRun]
    left_out: list[str] = field(default_factory=list)


def find_runs(words: Sequence[str]) -> Found:
    """Returns the runs that paths and patterns name.

    Raises ConfigError for a path that is neither a run nor has any, and a pattern without a match.
    """
    if not words:
        raise ConfigError(
            "runs",
            "[]",
            "name what to compare: run folders, a sweep's folder, a folder of runs, or a pattern "
            "in quotes: moetrain compare runs/a runs/b 'runs/lr*'",
        )
    runs: dict[Path, FoundRun] = {}
    left_out: dict[str, None] = {}
    for word in words:
        for path, is_named in _paths(word):
            found = _in_folder(path)
            if not found.runs and not found.left_out:
                if is_named:
                    raise ConfigError("runs", word, _no_run(path))
                if path.is_dir() and path.name != "sweeps":
                    left_out[f"{path.name}: is no run's folder, and has none"] = None
            left_out |= dict.fromkeys(found.left_out)
            for run in found.runs:
                key = run.path.resolve()
                if key not in runs or runs[key].varied is None:
                    runs[key] = run
    return Found(runs=list(runs.values()), left_out=list(left_out))


def _paths(word: str) -> list[tuple[Path, bool]]:
    """Returns the paths that a word means, and whether it names them: a pattern doesn't."""
    path = Path(word).expanduser()
    if path.exists() or not glob.has_magic(word):
        return [(path, True)]
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        beside = _runs_in(Path(word).parent) or _runs_in(Path("runs"))
        raise ConfigError("runs", word, f"nothing has such a name{_named(beside)}")
    return [(Path(match), False) for match in matches]


def _in_folder(path: Path) -> Found:
    if is_run_dir(path):
        return Found(runs=[FoundRun(path=path)])
    if (path / TRIALS).is_file():
        return _of_sweep(path)
    if runs := _runs_in(path):
        return Found(runs=[FoundRun(path=run) for run in runs])
    sweeps = sorted(path.glob(f"*/{TRIALS}"), reverse=True)  # the newest says how runs are called
    found = [_of_sweep(trials.parent) for trials in sweeps]
    return Found(
        runs=[run for one in found for run in one.runs],
        left_out=[line for one in found for line in one.left_out],
    )


def _of_sweep(folder: Path) -> Found:
    """Returns the runs of a sweep's trials, those beside its folder first: it may have moved."""
    runs, left_out = [], []
    for row in iterate_metrics(folder / TRIALS):
        recorded = Path(str(row.get("run", "")))
        places = [*_beside(folder, row, recorded), recorded]
        path = next((place for place in places if is_run_dir(place)), None)
        end = str(row.get("end"))
        if path is None:
            left_out.append(f"{recorded.name}: its trial has not begun, or its folder is gone")
        elif end in _NO_RUN:
            left_out.append(f"{recorded.name}: {row.get('other_settings') or end}")
        else:
            varied = row.get("varied")
            named = varied if isinstance(varied, dict) else {}
            runs.append(FoundRun(path=path, varied={str(k): str(v) for k, v in named.items()}))
    return Found(runs=runs, left_out=left_out)


def _beside(folder: Path, row: Mapping[str, Any], recorded: Path) -> Iterator[Path]:
    """Yields where a trial's run is from its sweep's folder."""
    if isinstance(relative := row.get("relative"), str):
        yield Path(os.path.normpath(folder / relative))
    else:  # of an older version: as the folder of sweeps lies by default
        yield Path(os.path.normpath(folder / ".." / ".." / recorded.name))


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_run_dir(path))


def _no_run(path: Path) -> str:
    """Returns why a folder has no run, and which runs there are beside it."""
    beside = _runs_in(path.absolute().parent)
    if not path.exists():
        return f"does not exist{nearest(path.name, [run.name for run in beside])}{_named(beside)}"
    if not path.is_dir():
        return "is a file: name the folder of a run"
    if (path / "multirun.yaml").is_file():
        return (
            "is the folder of a sweep that has no list of its trials: name its runs, or run the "
            f"sweep's command again{_named(_runs_in(path.absolute().parents[1]))}"
        )
    return f"has neither config.yaml nor metrics.jsonl, and no folder in it has{_named(beside)}"


def _named(runs: Sequence[Path]) -> str:
    if not runs:
        return ""
    more = f" and {len(runs) - MAX_NAMED} more" if len(runs) > MAX_NAMED else ""
    return f". Runs in {runs[0].parent}: {', '.join(r.name for r in runs[:MAX_NAMED])}{more}"
