"""What the loop counts and records, against figures written out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import Batch
from moetrain.model import training_flops_per_token
from moetrain.settings import Resolved
from moetrain.train.loop import router_metrics, tokens_by_source
from moetrain.train.step_report import StepReport
from tests.support.ranks import run_ranks
from tests.support.runs import metrics_of, tiny_config, train_as_rank, write_shards
from tests.train.test_runs import spoil_gradients

PEAK = 2.0  # TFLOPS


def test_a_sources_tokens_are_its_valid_targets() -> None:
    mask = np.arange(6) < np.array([6, 2, 0, 5])[:, None]
    batch = Batch(
        tokens=np.zeros((4, 6), dtype=np.int64), targets=np.zeros((4, 6), dtype=np.int64),
        loss_mask=mask, document_starts=mask, sources=np.array([2, 0, 0, 2]),
    )  # fmt: skip
    assert tokens_by_source(batch, num_sources=4) == [2, 0, 11, 0]


def test_an_expert_is_dead_without_an_assignment_and_not_with_one() -> None:
    counts = torch.tensor([[0.0, 1.0, 7.0, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    report = StepReport(
        loss=1.0, cross_entropy=1.0, load_balance_loss=1.0, z_loss=1.0, entropy=1.0,
        expert_counts=counts, grad_norm=1.0, num_tokens=4, skipped=False,
    )  # fmt: skip
    names = ("load_balance_loss", "z_loss", "max_violation", "entropy")
    found = router_metrics(report, {f"router/{name}": 0.0 for name in names})
    assert found["router/dead_experts"] == 2
    assert found["router/expert_load"] == [[0.0, 0.125, 0.875, 0.0], [0.25] * 4]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


def test_rate_and_utilisation_are_those_of_the_recorded_step(tmp_path: Path, shards: Path) -> None:
    """Half a cosine after two steps of warm-up; FLOPs of all ranks over the peak of all."""
    config = tiny_config(
        tmp_path, shards=shards, num_workers=2, cluster__peak_tflops_per_gpu=PEAK,
        schedule__final_lr_ratio=0.0,
    )  # fmt: skip
    run_ranks(train_as_rank, 2, config, None, 1)
    records = [json.loads(r) for r in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    flops = training_flops_per_token(config.model, seq_len=32)
    for record in records:
        step, speed = record["step"] - 1, record["perf/tokens_per_second"]
        half = 0.5 * (1 + math.cos(math.pi * (step - 2) / 6)) if step < 7 else 0.0
        expected = 0.01 * ((step + 1) / 2 if step < 2 else half)
        assert record["optim/lr"] == pytest.approx(expected, rel=1e-12)
        assert record["perf/tokens_per_second_per_device"] == pytest.approx(speed / 2)
        assert record["train/flops"] == (step + 1) * 8 * 32 * flops
        used = record["perf/model_flops_utilization"]
        assert used == pytest.approx(flops * speed / (2 * PEAK * 1e12))


def test_skipped_steps_in_a_row_are_counted_from_the_last_good_one(
    tmp_path: Path, shards: Path
) -> None:
    """Three in all, and never two together: a run that stops at two goes to its end."""
    config: Resolved = tiny_config(
        tmp_path, shards=shards, num_workers=2, train__max_skipped_steps=2
    )
    outcomes: list[Any] = run_ranks(spoil_gradients, 2, config, [1, 3, 5])
    assert all(outcome.finished for outcome in outcomes)
    assert metrics_of(tmp_path)[-1]["train/skipped_steps"] == 3
