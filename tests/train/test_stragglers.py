"""Which rank is slower than its peers: the rule on made-up times, and real ranks, one slowed."""

import os
import signal
import statistics
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from moetrain.observe import read_metrics
from moetrain.settings import Resolved
from moetrain.train import stragglers
from moetrain.train.stragglers import (
    MARGIN,
    WINDOW_SECONDS,
    WINDOW_STEPS,
    WINDOWS,
    Finding,
    Times,
    Watch,
    median_of_others,
)
from tests.support.ranks import run_ranks
from tests.support.runs import events_of, tiny_config, train_as_rank, write_shards

LONG = max(WINDOW_STEPS, int(WINDOW_SECONDS))  # steps of a second that make a window


def times(attention: list[float], waits: list[float] | None = None, *, steps: int = LONG,
          step_seconds: float = 1.0) -> Times:  # fmt: skip
    return Times(
        attention=np.array(attention),
        waits=np.array(waits or [0.0] * len(attention)),
        num_steps=steps,
        seconds=steps * step_seconds,
    )


def told(*windows: Times) -> list[list[Finding]]:
    """Returns what a watch reports after each of the records."""
    watch = Watch()
    return [watch.take(window) for window in windows]


EVEN, SLOW, SLOWER = times([1, 1.1, 0.9]), times([1, 2.1, 0.9]), times([1, 5.1, 0.9])


def test_the_median_of_the_others_is_that_of_the_others() -> None:
    chance = Random(0)
    for size in (2, 3, 4, 7, 10):
        values = [chance.choice([1.0, 2.0, chance.random()]) for _ in range(size)]
        others = [statistics.median(values[:i] + values[i + 1 :]) for i in range(size)]
        assert median_of_others(np.array(values)).tolist() == pytest.approx(others)


def test_a_rank_that_is_slow_for_long_is_told_of_once() -> None:
    findings = told(SLOW, SLOW, SLOW, SLOW, SLOW)
    assert [len(found) for found in findings] == [0, 0, 1, 0, 0]
    (found,) = findings[2]
    assert (found.rank, found.kind) == (1, "slow")
    assert found.ratio == pytest.approx(2.1 / 0.95)
    assert "computes 2.2 times as long" in found.reason


def test_it_is_told_of_again_when_it_gets_twice_as_slow_and_when_it_is_over() -> None:
    findings = told(*[SLOW] * 3, *[SLOWER] * 4, *[EVEN] * 4, *[SLOW] * 3)
    assert [[f.kind for f in found] for found in findings] == (
        [[], [], ["slow"], [], [], ["slower"], [], [], [], ["over"], [], [], [], ["slow"]]
    )


def test_a_moment_s_slowness_is_nobody_s_business() -> None:
    assert not any(told(*[SLOW, SLOW, EVEN] * 5))
    others = [times([2.1, 1, 1]), times([1, 2.1, 1])]
    assert not any(told(*others * 5)), "nor are ranks that take turns"


def test_records_of_few_or_fast_steps_are_put_together() -> None:
    one_step = times([1, 2.1, 0.9], steps=1, step_seconds=1.0)
    findings = told(*[one_step] * (WINDOWS * LONG))
    assert [bool(found) for found in findings] == [False] * (WINDOWS * LONG - 1) + [True]
    long = times([1, 2.1, 0.9], steps=WINDOW_STEPS // 2, step_seconds=100.0)
    assert [bool(found) for found in told(*[long] * 2 * WINDOWS)] == [False] * 5 + [True]
    fast = times([1, 2.1, 0.9], steps=100, step_seconds=WINDOW_SECONDS / 200)
    assert [bool(found) for found in told(*[fast] * 2 * WINDOWS)] == [False] * 5 + [True]


def test_of_two_ranks_the_other_is_the_measure() -> None:
    """Their median is their mean: beside it nothing short of three times as slow would be 1.5."""
    assert times([1.0, 1.6]).ratios().tolist() == pytest.approx([1.0, 1.6])
    assert any(told(*[times([1.0, MARGIN * 1.01])] * WINDOWS))
    assert not any(told(*[times([1.0, MARGIN * 0.99])] * WINDOWS))


def test_a_slow_node_s_ranks_are_all_named() -> None:
    (*_, findings) = told(*[times([1.0] * 8 + [2.0] * 4)] * WINDOWS)
    assert [found.rank for found in findings] == [8, 9, 10, 11]


def test_a_rank_that_waits_for_data_holds_up_the_step_by_its_wait() -> None:
    waiting = times([1, 1, 1], [0.1, 0.1, 0.5], step_seconds=1.0)
    assert waiting.ratios().tolist() == pytest.approx([1, 1, 1 / 0.6])
    (found,) = told(*[waiting] * WINDOWS)[-1]
    assert (found.rank, "waits 0.5 s a step for data, its peers 0.1 s" in found.reason) == (2, True)
    harmless = times([1, 1, 1], [1e-6, 1e-6, 1e-2])
    assert not any(told(*[harmless] * WINDOWS)), "however many times as long it is"


def test_nothing_measured_is_no_straggler() -> None:
    assert times([0, 0], [0, 0], step_seconds=0.0).ratios().tolist() == [1, 1]
    assert np.isfinite(times([0, 1], [9, 0], step_seconds=1.0).ratios()).all()


# ── Real ranks ────────────────────────────────────────────────────────────────────────────────


def train_slowed(config: Resolved, slow_rank: int | None) -> dict[str, Any]:
    """Trains as a rank, one of which is stopped most of the time, as if its core were shared."""
    import torch.distributed as dist

    stragglers.WINDOW_SECONDS = 0.5  # the long window is for noise, and would take minutes
    child = os.fork() if dist.get_rank() == slow_rank else None
    if child == 0:
        while True:
            os.kill(os.getppid(), signal.SIGSTOP)
            time.sleep(0.016)
            os.kill(os.getppid(), signal.SIGCONT)
            time.sleep(0.004)
    try:
        return dict(train_as_rank(config, None, 1).last)
    finally:
        if child:
            os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_a_rank_that_is_slowed_is_named_in_events_and_metrics(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    config = tiny_config(
        tmp_path, shards=shards, num_workers=2, train__num_steps=60,
        train__seq_len=64, train__global_batch_size=16, observe__log_every_steps=10,
        checkpoint__every_steps=1000,
    )  # fmt: skip
    last, _ = run_ranks(train_slowed, 2, config, 1)
    told = [event for event in events_of(tmp_path) if event["event"] == "straggler"]
    assert told, f"none told of; the last record has {last}"
    assert {event["rank"] for event in told} == {1}
    assert told[0]["node"] == os.uname().nodename
    assert told[0]["ratio"] >= MARGIN
    assert "layer's attention" in told[0]["reason"]
    # The machine's own noise may hide it in some records, the last one too.
    records = read_metrics(tmp_path / "runs/tiny/metrics.jsonl")
    slowest = max(records, key=lambda record: float(record["perf/slowest_rank_ratio"]))
    assert slowest["perf/slowest_rank"] == 1
    assert slowest["perf/slowest_rank_ratio"] > MARGIN


def test_one_rank_alone_is_compared_with_nobody(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, shards=write_shards(tmp_path), train__num_steps=2)
    (last,) = run_ranks(train_slowed, 1, config, None)
    assert "train/loss" in last
    assert not any("slowest" in name for name in last)
