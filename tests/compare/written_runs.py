"""Run folders as training leaves them, with figures of our own, by the project's own writers."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from moetrain.checkpoint.manifest import Manifest, folder_name, manifest_text
from moetrain.config import resolve
from moetrain.kinds import EventKind
from moetrain.observe import EventLog, MetricsFile
from moetrain.settings import Config
from moetrain.settings.validation import validated
from moetrain.train.changes import as_plain
from tests.support.runs import tiny_values

TOKENS = 256
"""Of a step: eight sequences of 32."""
TEXT = "1f2e3d4c5b6a79881f2e3d4c5b6a7988"


def write_run(
    folder: Path,
    name: str,
    *,
    losses: Sequence[float],
    seed: int = 0,
    finished: bool = True,
    text: str | None = TEXT,
    source: str = "code",
    extra: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Writes a run with a validation loss at each step; returns its folder.

    `text` is its shards' fingerprint, None for a run that has no checkpoint yet. `extra` is added
    to its configuration, and `record` to each of its records.
    """
    changes = {"train__num_steps": len(losses), "run__name": name, "seed": seed} | changes
    values = tiny_values(folder, shards=folder / "shards", **changes)
    config = as_plain(resolve(validated(values, Config), num_workers=1, now=datetime(2026, 1, 1)))
    config |= extra or {}
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    event = EventLog(run / "events.jsonl").write
    event(EventKind.start)
    experts = config["model"]["num_experts"]
    event(EventKind.model, parameters=1000 * experts, active_parameters=500, flops_per_token=3000.0)
    metrics = MetricsFile(run / "metrics.jsonl")
    for step, loss in enumerate(losses, start=1):
        metrics.write(
            {
                "step": step,
                "train/tokens": TOKENS * step,
                "train/cross_entropy": loss + 0.5,
                "perf/step_seconds": 2.0,
                "validation/loss": loss,
                f"validation/{source}/loss": loss,
                f"validation/{source}/bits_per_byte": 2 * loss,
                **(record or {}),
            }
        )
    if text is not None:
        step = len(losses)
        save = run / "checkpoints" / folder_name(step)
        save.mkdir(parents=True)
        manifest = Manifest(
            step=step, attempt=1, state={"data": text}, config=config, tensors={}, files={}
        )
        (save / "manifest.json").write_text(manifest_text(manifest))
    if finished:
        event(EventKind.finish, step=len(losses))
    return run


def write_arms(folder: Path, values: Mapping[int, Sequence[float]], **changes: Any) -> list[Path]:
    """Writes a run a seed for each number of experts, which ends with a value; returns folders."""
    return [
        write_run(
            folder, f"e{experts}-{seed}", losses=[value + 2, value + 1, value], seed=seed,
            model__num_experts=experts, **changes,
        )
        for experts, ends in values.items()
        for seed, value in enumerate(ends)
    ]  # fmt: skip


def write_sweep(folder: Path, runs: Sequence[Path], *, relative: bool = True) -> Path:
    """Writes what a sweep leaves of its trials; returns its folder."""
    sweep = folder / "runs" / "sweeps" / "20261201-120000"
    sweep.mkdir(parents=True)
    rows = []
    for run in runs:
        config = yaml.safe_load((run / "config.yaml").read_text())
        varied = {"model.num_experts": str(config["model"]["num_experts"])}
        row = {"varied": varied | {"seed": str(config["seed"])}, "run": str(run), "end": "done"}
        rows.append(row | ({"relative": f"../../{run.name}"} if relative else {}))
    (sweep / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sweep
