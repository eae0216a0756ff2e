"""A run folder as a training run would leave it, made of arithmetic."""

import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from data_pipeline import Baselines

CONFIG = """\
run:
  name: {name}
model:
  num_layers: {num_layers}
  num_experts: {num_experts}
train:
  num_steps: {num_steps}
"""


def write_run(
    folder: Path,
    *,
    num_records: int,
    num_layers: int = 4,
    num_experts: int = 8,
    name: str = "toy-synthetic",
    every: int = 10,
) -> Path:
    """Write config.yaml, metrics.jsonl and events.jsonl of a run that learns and balances."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    num_steps = num_records * every
    (folder / "config.yaml").write_text(
        CONFIG.format(
            name=json.dumps(name),
            num_layers=num_layers,
            num_experts=num_experts,
            num_steps=num_steps,
        )
    )
    taste = [[chance.gauss(0, 1) for _ in range(num_experts)] for _ in range(num_layers)]
    with (folder / "metrics.jsonl").open("w") as file:
        for index in range(num_records):
            file.write(json.dumps(_record(index, num_records, every, taste, chance)) + "\n")
    events = _events(num_steps)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def _record(
    index: int, num_records: int, every: int, taste: list[list[float]], chance: random.Random
) -> dict[str, Any]:
    step, done = (index + 1) * every, (index + 1) / num_records
    loss = 1.45 + 4.1 * math.exp(-step / 60) + 0.5 * math.exp(-step / 400)
    loss += chance.gauss(0, 0.03)
    loads = []
    for liking in taste:
        weights = [math.exp(x * 1.2 * math.exp(-3 * done) + chance.gauss(0, 0.05)) for x in liking]
        loads.append([weight / sum(weights) for weight in weights])
    violation = max(max(layer) * len(layer) - 1 for layer in loads)
    record: dict[str, Any] = {
        "step": step,
        "train/tokens": step * 4096,
        "train/loss": loss + 0.01,
        "train/cross_entropy": loss,
        "router/load_balance_loss": 1 + 0.1 * violation,
        "router/max_violation": violation,
        "router/entropy": 2.0 - 0.6 * done,
        "router/dead_experts": 0,
        "optim/lr": 3e-3 * min(1, step / 50) * (0.55 + 0.45 * math.cos(math.pi * done)),
        "optim/grad_norm": 0.4 + 3 * math.exp(-step / 80) + abs(chance.gauss(0, 0.08)),
        "perf/step_seconds": 0.28,
        "perf/tokens_per_second": 14300 + chance.gauss(0, 400),
        "perf/data_wait_seconds": 0.001 + abs(chance.gauss(0, 0.0004)),
    }
    record["router/expert_load"] = [[round(share, 6) for share in shares] for shares in loads]
    if (index + 1) % max(1, num_records // 6) == 0:
        record["validation/loss"] = loss + 0.06
        record["validation/stdlib/bits_per_byte"] = (loss + 0.06) / math.log(2)
    return record


def _events(num_steps: int) -> list[dict[str, Any]]:
    clock = datetime(2026, 11, 21, 5, 0, tzinfo=UTC)
    baselines = vars(Baselines(byte_bigram_bits_per_byte=3.54, zlib_bits_per_byte=1.83))
    kinds: list[dict[str, Any]] = [
        {"event": "start", "reason": None, "num_ranks": 2},
        {"event": "data", "reason": None, "source": "stdlib", "baselines": baselines},
        {"event": "training", "reason": None, "step": 0, "attempt": 1},
        {"event": "save", "reason": "every 100 steps", "step": num_steps // 2},
        {"event": "failure", "reason": "rank 1 was killed by SIGKILL", "step": num_steps // 2 + 7},
        {"event": "restart", "reason": "attempt 2 of 4", "step": num_steps // 2},
        {"event": "training", "reason": None, "step": num_steps // 2, "attempt": 2},
        {"event": "save", "reason": None, "step": num_steps},
        {"event": "finish", "reason": f"all {num_steps} steps made", "step": num_steps},
    ]
    return [
        {"time": (clock + timedelta(seconds=30 * i)).isoformat(timespec="milliseconds")} | event
        for i, event in enumerate(kinds)
    ]
