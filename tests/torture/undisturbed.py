"""The undisturbed run: every disturbed one must have the same result."""

import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.observe import read_metrics
from moetrain.settings import Config
from tests.support.runs import metrics_of, tiny_config, write_shards
from tests.torture.attempts import WORLD_SIZE, Attempt, train
from tests.torture.content import digest

# About 10 MB a checkpoint, nearly all of it in experts, and steps that take a few milliseconds.
_MODEL = {
    "model__dim": 128, "model__num_layers": 1, "model__ffn_hidden_dim": 512, "model__head_dim": 32,
    "model__num_heads": 4, "model__max_seq_len": 16, "train__seq_len": 16,
    "train__global_batch_size": 2, "train__validation_sequences": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """The results of a whole run, and three of its checkpoints."""

    shards: Path
    num_steps: int
    metrics: list[dict[str, Any]]
    digests: dict[int, str]
    """Of tensors and state at each step."""
    save_seconds: float
    """Of a blocking save; the median."""
    pristine: Path
    """A folder with the checkpoints of the last three steps."""


def configured(folder: Path, *, shards: Path, num_steps: int, **changes: Any) -> Config:
    """Returns the configuration of a run that saves at every step."""
    values = _MODEL | {"train__num_steps": num_steps, "checkpoint__every_steps": 1} | changes
    return tiny_config(folder, shards=shards, num_workers=WORLD_SIZE, **values)


def run_undisturbed(folder: Path, *, num_steps: int) -> Undisturbed:
    """Trains the whole run, keeps what its checkpoints hold, and deletes all but three."""
    shards = write_shards(folder)
    whole = folder / "whole"
    config = configured(
        whole,
        shards=shards,
        num_steps=num_steps,
        checkpoint__async_save=False,
        checkpoint__keep_every=1,
    )
    checkpoints = whole / "runs/tiny/checkpoints"
    with Attempt(train, config, 1, directory=whole, log=folder / "undisturbed.log") as attempt:
        attempt.result(within=300)
    folders = sorted(checkpoints.glob("step_*"))
    assert len(folders) == num_steps, folders
    digests = {int(f.name.removeprefix("step_")): digest(f) for f in folders}
    stalls = [
        stall
        for record in read_metrics(whole / "runs/tiny/metrics.jsonl")
        if (stall := record.get("checkpoint/stall_seconds")) is not None
    ]
    for old in folders[:-3]:
        shutil.rmtree(old)
    (checkpoints / "attempt").write_text("1")
    return Undisturbed(
        shards=shards,
        num_steps=num_steps,
        metrics=metrics_of(whole),
        digests=digests,
        save_seconds=statistics.median(stalls),
        pristine=checkpoints,
    )
