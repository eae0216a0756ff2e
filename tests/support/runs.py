"""Small real runs for tests: a tiny model on a small folder of shards."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline import BuildSettings, build_shards
from moetrain.config import resolve
from moetrain.settings import Config, Resolved
from moetrain.settings.validation import validated
from moetrain.train.control import Control, Outcome, RankPlace
from moetrain.train.rank import run_rank

Changes = dict[str, Any]
"""What differs from the tiny configuration: `a__b` names the setting a.b."""

TIMING = ("perf/", "memory/", "checkpoint/")


def write_shards(folder: Path) -> Path:
    """Builds byte shards of a few dozen small documents; returns their folder."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(60):
        text = f"def function_{number}(x):\n    return x * {number} + {number * 7 % 13}\n" * 12
        (corpus / f"{number:02d}.py").write_text(text)
    settings = BuildSettings(
        corpus=str(corpus), tokenizer="bytes", to=str(folder / "shards"), validation_fraction=0.1
    )
    build_shards(settings, progress=False)
    return folder / "shards"


def tiny_values(folder: Path, *, shards: Path | str, **changes: Any) -> dict[str, Any]:
    """Returns the plain configuration of a tiny run; `a__b=x` changes a.b."""
    values: dict[str, Any] = {
        "model": {
            "dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
            "ffn_hidden_dim": 32, "num_experts": 4, "top_k": 2, "vocab_size": 257,
            "max_seq_len": 64, "rope_theta": 1e4,
            "router": {"bias_update_rate": 0.001},
        },
        "train": {
            "num_steps": 8, "global_batch_size": 8, "seq_len": 32, "validate_at_start": False,
        },
        "run": {"name": "tiny", "dir": str(folder / "runs"), "device": "cpu"},
        "optim": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
        "data": {"dir": str(shards)},
        "checkpoint": {"every_steps": 3},
        "observe": {"log_every_steps": 1, "progress": "off", "wandb": {"mode": "disabled"}},
    }  # fmt: skip
    for key, value in changes.items():
        *path, last = key.split("__")
        node = values
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return values


def tiny_config(
    folder: Path, *, shards: Path | str, num_workers: int = 1, **changes: Any
) -> Resolved:
    """Returns a resolved tiny configuration."""
    config = validated(tiny_values(folder, shards=shards, **changes), Config)
    return resolve(config, num_workers=num_workers, now=datetime(2026, 1, 1))


def train_as_rank(config: Resolved, stop_at: int | None, attempt: int) -> Outcome:
    """Trains as one rank of an already joined world; asks for a stop after a step."""
    import torch.distributed as dist

    control = Control()
    if stop_at is not None:
        publish, beat = control.publish, control.heartbeat

        def stop_in_time(phase: str, step: int) -> None:
            if phase == "between steps" and step >= stop_at:
                control.request_stop()
            beat(phase, step)

        control.heartbeat, control.publish = stop_in_time, publish
    place = RankPlace(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_world_size=os.cpu_count() or 1,  # a thread each: more would wait for each other
        rendezvous="joined",
        attempt=attempt,
    )
    return run_rank(config, place, control)


def metrics_of(folder: Path, name: str = "tiny") -> list[dict[str, Any]]:
    """Returns a run's metric records without their timings."""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMING)} for line in lines
    ]


def events_of(folder: Path, name: str = "tiny") -> list[dict[str, Any]]:
    """Returns a run's events."""
    lines = (folder / "runs" / name / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
