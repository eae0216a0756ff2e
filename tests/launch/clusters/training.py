"""A tiny run on two hosts, and how to wait for it."""

import time
from collections.abc import Callable
from pathlib import Path

from tests.support.runs import metrics_of

# gloo needs the interface's name: a host's own name resolves to nothing here.
TINY = [
    "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.head_dim=16", "model.ffn_hidden_dim=32", "model.num_experts=4",
    "train.num_steps=100000", "train.global_batch_size=8", "train.seq_len=32",
    "train.validate_at_start=false",
    "checkpoint.every_steps=1000", "schedule.warmup_steps=5", "observe.log_every_steps=1",
    "observe.wandb.mode=disabled", "run.device=cpu", "run.name=tiny", "launch.num_workers=2",
    "cluster=ethernet", "cluster.env.GLOO_SOCKET_IFNAME=eth0",
    "launch.wait_for_nodes_seconds=100",  # the head's node may be there long before the other
]  # fmt: skip


def steps(folder: Path) -> list[int]:
    """Returns the steps that the run has logged so far."""
    written = (folder / "runs/tiny/metrics.jsonl").exists()
    return [record["step"] for record in metrics_of(folder)] if written else []


def wait_for(
    condition: Callable[[], bool], what: Callable[[], str], *, seconds: float = 150
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what()}"
        time.sleep(0.2)
