"""What a record says of the steps since the last one, and that a resumed run says the same."""

import dataclasses
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.checkpoint.folders import candidates
from moetrain.checkpoint.manifest import read_manifest
from moetrain.settings import Resolved
from moetrain.train.means import RunningMeans
from moetrain.train.state import TrainState
from moetrain.train.step_report import StepReport
from tests.support.ranks import run_ranks
from tests.support.runs import Changes, metrics_of, tiny_config, train_as_rank, write_shards
from tests.train.test_runs import spoil_gradients

BY_TOKENS = (
    "train/loss", "train/cross_entropy", "router/load_balance_loss", "router/z_loss",
    "router/entropy",
)  # fmt: skip
BY_STEPS = (
    "optim/grad_norm", "optim/clip_factor", "optim/clipped_share", "router/max_violation",
    "router/dead_experts_mean",
    *(f"optim/grad_norm/{role}"
      for role in ("embedding", "attention", "norm", "router", "experts", "head")),
)  # fmt: skip
BY_SOURCE = "train/corpus/cross_entropy"


def report(loss: float, *, tokens: int, skipped: bool = False) -> StepReport:
    return StepReport(
        loss=loss,
        cross_entropy=loss / 3,
        load_balance_loss=1.0,
        z_loss=0.1,
        entropy=0.2,
        expert_counts=torch.tensor([[3.0, 1.0], [2.0, 2.0]], dtype=torch.float64),
        grad_norm=loss,
        num_tokens=tokens,
        skipped=skipped,
    )


def test_a_mean_counts_each_step_by_its_tokens_and_skipped_steps_not_at_all() -> None:
    means = RunningMeans()
    means.add(report(1.0, tokens=10))
    means.add(report(math.nan, tokens=999, skipped=True))
    last = report(4.0, tokens=30)
    means.add(last)
    values = means.values(last)
    assert values["train/loss"] == pytest.approx((1.0 * 10 + 4.0 * 30) / 40, rel=1e-15)
    assert values["train/cross_entropy"] == pytest.approx(3.25 / 3, rel=1e-15)
    assert values["optim/grad_norm"] == 2.5, "a step has one norm, whatever its tokens"
    assert values["router/max_violation"] == 0.5, "of the worst layer"
    assert values["router/z_loss"] == pytest.approx(0.1, rel=1e-15)


def test_the_heads_z_loss_is_a_mean_by_tokens_and_there_only_where_it_has_a_weight() -> None:
    means = RunningMeans()
    means.add(report(1.0, tokens=10))
    assert "train/z_loss" not in means.values(report(1.0, tokens=10))
    for value, tokens in ((2.0, 10), (6.0, 20)):  # from a resume on: means begin with its value
        means.add(last := dataclasses.replace(report(1.0, tokens=tokens), head_z_loss=value))
    assert means.values(last)["train/z_loss"] == pytest.approx(2 + 20 / 40 * 4, rel=1e-15)


def test_a_source_s_mean_counts_its_own_tokens_and_clipped_steps_have_a_share() -> None:
    means = RunningMeans()
    for tokens, nats, clip in (((6, 4), (3.0, 8.0), 0.5), ((0, 10), (0.0, 5.0), 1.0)):
        step = replace(
            report(1.0, tokens=10), source_nats=nats, clip_factor=clip, grad_norms={"head": clip},
            expert_counts=torch.tensor([[clip - 1, 4.0], [0.0, 4.0]], dtype=torch.float64),
        )  # fmt: skip
        means.add(step, source_tokens=dict(zip("ab", tokens, strict=True)))
    skipped = replace(step, skipped=True, source_nats=(math.nan, math.nan))
    means.add(skipped, source_tokens={"a": 1, "b": 1})
    values = means.values(step)
    assert values["train/a/cross_entropy"] == 0.5
    assert values["train/b/cross_entropy"] == pytest.approx(13 / 14, rel=1e-15)
    assert values["optim/clipped_share"] == 0.5
    assert values["optim/clip_factor"] == values["optim/grad_norm/head"] == 0.75
    assert values["router/dead_experts_mean"] == 1.5
    assert "train/a/cross_entropy" not in RunningMeans().values(skipped)
    state = TrainState(since_record=means)
    assert TrainState.restored(json.loads(json.dumps(state.as_json()))) == state


def test_of_one_step_the_mean_is_its_value_and_of_skipped_steps_alone_the_last_one_s() -> None:
    for tokens, loss in ((3, 0.1), (7, 1 / 3), (2**31 + 1, 5e-324), (49, math.pi)):
        means, one = RunningMeans(), report(loss, tokens=tokens)
        means.add(one)
        assert means.values(one)["train/loss"] == loss
        assert means.values(one)["train/cross_entropy"] == loss / 3
    means = RunningMeans()
    for loss in (1.0, math.inf):
        skipped = report(loss, tokens=5, skipped=True)
        means.add(skipped)
    assert means.values(skipped)["train/loss"] == math.inf


def test_means_are_restored_and_an_imported_model_has_none() -> None:
    imported = {"imported_dtype": "bfloat16"}
    assert TrainState.restored(imported).since_record == RunningMeans()
    state = TrainState(source_tokens={"a": 7})
    state.since_record.add(report(1 / 3, tokens=7))
    assert TrainState.restored(json.loads(json.dumps(state.as_json()))) == state


def test_flops_of_a_checkpoint_without_them_are_those_of_its_samples() -> None:
    state = TrainState.restored({"samples": 10})
    for _ in range(2):
        state.count_sequences(4, flops=0.5)
    assert (state.samples, state.flops) == (18, 9.0)
    assert TrainState.restored(state.as_json()).flops == 9.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


# Sequences of whole documents: each step has other tokens.
UNEVEN: Changes = {"data__packing": "best_fit", "model__router__bias_update_rate": 0.5}
SGD: Changes = {
    "optim__name": "sgd",
    "optim__lr": 0.1,
    "model__router__bias_update_rate": 0.0,
}


Turn = tuple[Resolved, list[int] | None, int | None]
"""A configuration, the steps to spoil, and the step to stop at."""


def train_in_turn(runs: list[Turn]) -> None:
    """Trains as a rank: one run after the other."""
    for attempt, (config, spoiled, stop_at) in enumerate(runs, start=1):
        if spoiled:
            spoil_gradients(config, spoiled)
        else:
            train_as_rank(config, stop_at, attempt)


def expected(every_step: list[dict[str, Any]], first: int, last: int) -> dict[str, float]:
    """Returns the means over steps of a run that has a record of each."""
    tokens = [0, *(r["train/tokens"] for r in every_step)]
    steps = [
        (r, tokens[r["step"]] - tokens[r["step"] - 1])
        for r in every_step[first - 1 : last]
        if r["train/loss"] is not None
    ]
    total = sum(weight for _, weight in steps)
    by_tokens = {
        n: sum(r[n] * weight for r, weight in steps) / total for n in (*BY_TOKENS, BY_SOURCE)
    }
    return by_tokens | {n: sum(r[n] for r, _ in steps) / len(steps) for n in BY_STEPS}


def test_a_record_is_the_mean_since_the_last_one_also_over_a_stop_and_in_other_layouts(
    tmp_path: Path, shards: Path
) -> None:
    """Two runs have a step that is not finite on rank 1; another stops between two records."""

    def config(name: str, every: int, *, num_workers: int = 2, **changes: Any) -> Resolved:
        changes = UNEVEN | {"observe__log_every_steps": every} | changes
        return tiny_config(tmp_path / name, shards=shards, num_workers=num_workers, **changes)

    runs: list[Turn] = [
        (config("one", 1), None, None), (config("few", 3), None, None),
        (config("parts", 3), None, 5), (config("parts", 3), None, None),
        (config("pair", 3, **SGD), None, None),
        # Last, since what spoils the steps stays.
        (config("spoiled", 1), [2], None), (config("spoiled few", 3), [2], None),
    ]  # fmt: skip
    run_ranks(train_in_turn, 2, runs)
    for one, few in (("one", "few"), ("spoiled", "spoiled few")):
        every_step, means = metrics_of(tmp_path / one), metrics_of(tmp_path / few)
        tokens = [record["train/tokens"] for record in every_step]
        assert len({after - before for before, after in pairwise(tokens)}) > 1, "uneven steps"
        assert [record["step"] for record in means] == [3, 6, 8]
        for record, (first, last) in zip(means, ((1, 3), (4, 6), (7, 8)), strict=True):
            assert (
                record.items()
                >= {
                    name: pytest.approx(value, rel=1e-12)
                    for name, value in expected(every_step, first, last).items()
                }.items()
            )
            same = every_step[last - 1]  # totals, and what is of the step
            for name in record.keys() - {*BY_TOKENS, *BY_STEPS, BY_SOURCE}:
                assert record[name] == same[name], name
    saved = candidates(tmp_path / "parts/runs/tiny/checkpoints")
    state = {m.step: m.state["since_record"] for m in map(read_manifest, saved)}
    assert (state[5]["steps"], state[8]) == (2, {
        "steps": 0, "tokens": 0, "over_tokens": {}, "over_steps": {},
        "source_tokens": {}, "over_sources": {},
    })  # fmt: skip
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "few"), "bit for bit"

    run_ranks(train_as_rank, 1, config("alone", 3, num_workers=1, **SGD), None, 1)
    for ours, theirs in zip(
        metrics_of(tmp_path / "pair"), metrics_of(tmp_path / "alone"), strict=True
    ):
        for name in (*BY_TOKENS, *BY_STEPS, BY_SOURCE):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
