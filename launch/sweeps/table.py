"""The table of a sweep's trials, and a line of JSON for each."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from data_pipeline.atomic_files import write_file
from data_pipeline.commands.shell import unquoted
from data_pipeline.quantities import count
from launch.dry_run import DryRun
from launch.sweeps.runs import TrialSettings, differences, listed
from moetrain.checkpoint.trained import trained
from moetrain.exit_codes import BAD_CONFIGURATION, DONE, FAILED, STOPPED
from moetrain.observe import by_source, final_loss, model_event, read_events, read_metrics

_NOTHING = "–"
_ENDS = {
    None: "not begun",
    DONE: "done",
    FAILED: "failed",
    BAD_CONFIGURATION: "bad settings",
    STOPPED: "stopped",
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One command of a sweep."""

    number: int
    varied: dict[str, str]
    """The settings that the sweep varies."""
    command: tuple[str, ...]
    """All overrides of its command, including name and folder."""
    run_dir: Path
    num_workers: int
    wanted: TrialSettings | None = None
    """The settings that its run must have been trained with."""

    @property
    def label(self) -> str:
        """Its label if there is no column for each setting."""
        return " ".join(f"{key}={value}" for key, value in self.varied.items())


@dataclass(frozen=True, kw_only=True)
class Result:
    """A trial's result; None for what it didn't reach."""

    trial: Trial
    exit_code: int | None
    """Its exit code; below zero: the signal that ended it."""
    other_settings: str | None = None
    """How its run's settings differ; then none of its figures are shown as this trial's."""
    steps: int | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    """The parameters that one token meets."""
    tokens: int | None = None
    """The tokens that it was trained on."""
    training_loss: float | None = None
    """The mean over the last tenth of its steps."""
    validation_loss: float | None = None
    bits_per_byte: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None

    @property
    def objective(self) -> float | None:
        """The objective for an optimising sweeper: the loss on held-out text, or in training."""
        if self.exit_code != 0:
            return None
        return self.training_loss if self.validation_loss is None else self.validation_loss

    @property
    def end(self) -> str:
        """How it ended, in words."""
        code = self.exit_code
        if self.other_settings:
            return "other settings"
        if code is not None and code < 0:
            return f"killed ({-code})"
        return _ENDS.get(code, f"exit {code}")


def varied_settings(overrides: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Returns each trial's overrides without those that all of them share."""
    pairs = [
        {key: unquoted(value) for key, _, value in (o.lstrip("+").partition("=") for o in trial)}
        for trial in overrides
    ]
    values: dict[str, set[str | None]] = {key: set() for trial in pairs for key in trial}
    for key, found in values.items():
        found.update(trial.get(key) for trial in pairs)
    return [{k: v for k, v in trial.items() if len(values[k]) > 1} for trial in pairs]


def other_settings(trial: Trial) -> str | None:
    """Returns how the run in a trial's folder differs from the trial, None if it doesn't."""
    run = trained(trial.run_dir) if trial.wanted else None
    if run is None or trial.wanted is None:
        return None
    return listed(differences(run, trial.wanted)) or None


def result_of(trial: Trial, exit_code: int | None) -> Result:
    """Returns a trial's result from its run folder; nothing if the run is not this trial's."""
    if other := other_settings(trial):
        return Result(trial=trial, exit_code=exit_code or FAILED, other_settings=other)
    if exit_code == BAD_CONFIGURATION:  # it was refused, so the folder is an earlier run's
        return Result(trial=trial, exit_code=exit_code)
    path = trial.run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    model = model_event(read_events(trial.run_dir / "events.jsonl"))
    known = {k: v for record in records for k, v in record.items() if v is not None}
    speeds = [s for record in records if (s := record.get("perf/tokens_per_second"))]
    return Result(
        trial=trial,
        exit_code=exit_code,
        steps=int(known["step"]) if "step" in known else None,
        parameters=model.get("parameters"),
        active_parameters=model.get("active_parameters"),
        tokens=known.get("train/tokens"),
        training_loss=final_loss(records),
        validation_loss=known.get("validation/loss"),
        bits_per_byte=by_source(known, "bits_per_byte"),
        tokens_per_second=median(speeds) if speeds else None,
    )


def write_table(results: Sequence[Result], folder: Path) -> str:
    """Returns the table, best loss first, and writes it and `trials.jsonl` into a folder."""
    ordered = sorted(results, key=_rank)
    write_trials(ordered, folder)
    ends = [r.end for r in ordered]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    text = f"sweep     {counts}; {folder}\n" + _table(ordered)
    for r in ordered:
        if r.other_settings:
            text += f"\n{r.trial.run_dir.name} is another run than trial {r.trial.number}: "
            text += r.other_settings
    table = (text + "\n").encode(errors="backslashreplace")
    write_file(folder / "table.txt", table, durable=False)
    return text


def write_trials(results: Sequence[Result], folder: Path) -> None:
    """Writes `trials.jsonl` into a folder: a line for each trial, which names its run."""
    lines = [
        {**asdict(r), "trial": r.trial.number, "varied": r.trial.varied,
         "command": list(r.trial.command), "run": str(r.trial.run_dir), "end": r.end,
         "relative": os.path.relpath(r.trial.run_dir, folder)}  # for a sweep that is moved
        for r in results
    ]  # fmt: skip
    found = "".join(json.dumps(line) + "\n" for line in lines)
    write_file(folder / "trials.jsonl", found, durable=False)


def _rank(result: Result) -> tuple[bool, bool, float]:
    """Sorts finished trials first, and losses on held-out text before others."""
    validated = result.validation_loss is not None
    loss = result.validation_loss if validated else result.training_loss
    return result.end != _ENDS[0], not validated, float("inf") if loss is None else loss


def preview_table(trials: Sequence[tuple[Trial, DryRun]]) -> str:
    """Returns a table of what a sweep's trials would train, and their progress."""
    keys = list(dict.fromkeys(key for trial, _ in trials for key in trial.varied))
    any_begun = any(rehearsal.newest for _, rehearsal in trials)
    header = ["trial", *keys, "run is", "parameters", "active", "FLOPs a token", "tokens", "ranks"]
    rows = [
        [
            str(trial.number),
            *(trial.varied.get(key, _NOTHING) for key in keys),
            rehearsal.state if any_begun else _NOTHING,
            count(preview.parameters),
            count(preview.active_parameters),
            count(preview.flops_per_token, billion="G"),
            count(preview.tokens),
            str(trial.num_workers),
            f"{preview.memory.total / 2**30:.3g}",
            trial.run_dir.name,
        ]
        for trial, rehearsal in trials
        for preview in [rehearsal.preview]
    ]
    return _aligned([*header, "GiB a rank", "run"], rows)


def _table(results: Sequence[Result]) -> str:
    keys = list(dict.fromkeys(key for r in results for key in r.trial.varied))
    sources = list(dict.fromkeys(source for r in results for source in r.bits_per_byte))
    header = ["trial", *keys, "end", "parameters", "active", "steps", "tokens"]
    header += ["loss", "validation"]
    header += [f"{source} bits/byte" for source in sources] + ["tokens/s", "run"]
    rows = [
        [
            str(r.trial.number),
            *(r.trial.varied.get(key, _NOTHING) for key in keys),
            r.end,
            _NOTHING if r.parameters is None else count(r.parameters),
            _NOTHING if r.active_parameters is None else count(r.active_parameters),
            _NOTHING if r.steps is None else str(r.steps),
            _NOTHING if r.tokens is None else count(r.tokens),
            _figure(r.training_loss),
            _figure(r.validation_loss),
            *(_figure(r.bits_per_byte.get(source)) for source in sources),
            _NOTHING if r.tokens_per_second is None else f"{r.tokens_per_second:,.0f}",
            r.trial.run_dir.name,
        ]
        for r in results
    ]
    return _aligned(header, rows)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns rows under their header, without empty columns."""
    columns = [c for c in zip(header, *rows, strict=True) if set(c[1:]) != {_NOTHING}]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    )


def _figure(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"
