"""How a sweep's costs grow: composing its combinations, and trials of one step.

`python -m benchmarks.scaling sweep`. The fixed cost of a sweep, mostly imports, is several trials'.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.scaling.case import Case
from data_pipeline import BuildSettings, build_shards

TINY = (
    "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.head_dim=16", "model.ffn_hidden_dim=32", "model.num_experts=4", "train.num_steps=1",
    "train.global_batch_size=2", "train.seq_len=32", "schedule.warmup_steps=0",
    "observe.wandb.mode=disabled", "run.device=cpu", "launch.mode=inline", "data.dir=shards",
)  # fmt: skip


def prepare(_: int, folder: Path) -> None:
    """Builds a few shards of bytes, a small part of them held out."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(f"{number} times {number} is {number**2}\n" * 12)
    to = str(folder / "shards")
    settings = BuildSettings(corpus=str(corpus), tokenizer="bytes", to=to, validation_fraction=0.02)
    build_shards(settings, progress=False)


def sweep(folder: Path, *words: str, rates: Sequence[int]) -> None:
    """Runs a sweep over learning rates."""
    chosen = "optim.lr=" + ",".join(f"{rate}e-6" for rate in rates)
    run = f"run.dir={folder}/runs-{os.getpid()}"
    subprocess.run(
        [sys.executable, "-m", "moetrain", "-m", *TINY, *words, run, chosen],
        cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def compose(size: int, folder: Path) -> None:
    """Composes and checks combinations, and begins none."""
    sweep(folder, "dry_run=true", rates=range(1, size + 1))


def train(size: int, folder: Path) -> None:
    """Trains trials of one step, one after the other, each with its report."""
    sweep(folder, rates=range(1, size + 1))


CASES = (
    Case(
        name="sweep/combinations", unit="combinations", sizes=(10, 100, 1000),
        prepare=prepare, run=compose,
    ),
    Case(name="sweep/trials", unit="trials", sizes=(1, 5, 10), prepare=prepare, run=train),
)  # fmt: skip
