"""Layers, experts and ranks: starting and training a model as they grow, and a rank's groups."""

import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.scaling.case import Case
from moetrain.config import resolve
from moetrain.parallel import begin_micro_batch, build_meshes, join_ranks
from moetrain.parallel.topology import Topology
from moetrain.settings import Config, ModelSettings, Resolved, TrainSettings
from moetrain.settings.optim import OptimSettings
from moetrain.train.build import build_model
from moetrain.train.micro_batch import MicroBatch
from moetrain.train.step import train_step

CPU = torch.device("cpu")
MODEL = ModelSettings(
    dim=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, ffn_hidden_dim=64,
    num_experts=8, top_k=2, vocab_size=257, max_seq_len=256, rope_theta=1e4,
)  # fmt: skip
SEQUENCES, SEQ_LEN = 4, 256


def _config(model: ModelSettings) -> Resolved:
    config = Config(
        model=model,
        train=TrainSettings(num_steps=1000, global_batch_size=SEQUENCES, seq_len=SEQ_LEN),
        optim=OptimSettings(lr=1e-3),
    )
    return resolve(config, num_workers=1, now=datetime(2026, 1, 1))


def _started(model: ModelSettings, folder: Path) -> None:
    """Builds the model, its optimizer and its groups, and takes three steps."""
    if not dist.is_initialized():
        rendezvous = f"file://{folder}/{time.monotonic_ns()}"
        join_ranks(rank=0, world_size=1, rendezvous=rendezvous, device=CPU, timeout_seconds=60)
    config = _config(model)
    built, optimizer, gradients, meshes = build_model(config, device=CPU, timeout_seconds=60)
    tokens = torch.randint(0, 257, (SEQUENCES, SEQ_LEN + 1))
    for _ in range(3):
        batch = MicroBatch(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            valid=torch.ones(SEQUENCES, SEQ_LEN, dtype=torch.bool),
        )
        train_step(
            [batch],
            model=built,
            optimizer=optimizer,
            gradients=gradients,
            meshes=meshes,
            learning_rate=1e-3,
            begin_micro_batch=lambda last: begin_micro_batch(built, config.parallel, last),
        )


def _layers(size: int, folder: Path) -> None:
    _started(replace(MODEL, num_layers=size), folder)


def _experts(size: int, folder: Path) -> None:
    _started(replace(MODEL, num_experts=size), folder)


def _ranks(size: int, folder: Path) -> None:
    """Makes one rank's meshes in a world of so many, twenty times, on torch's fake backend."""
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=size)
    real = dist.new_group
    made = []

    def new_group(ranks: list[int], **given: object) -> object:
        made.append(ranks)
        return real(ranks, backend="fake")

    dist.new_group = new_group  # type: ignore[assignment]  # takes less
    for _ in range(20):
        build_meshes(Topology(data_shard=size // 2, data_replicate=2, expert=8), device=CPU)
    assert len(made) == 20 * 4, "as many groups as axes, however many ranks"


CASES = (
    Case(name="model/layers", unit="layers", sizes=(4, 16, 64), run=_layers),
    Case(name="model/experts", unit="experts of a layer", sizes=(8, 64, 512), run=_experts),
    Case(name="model/ranks", unit="ranks", sizes=(64, 512, 4096), run=_ranks),
)
