"""The layer benchmark at sizes of milliseconds: what it compares is the same, and counted right."""

import json
import math
from statistics import median
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import moe_layer
from benchmarks.layers import Limit, Shape, Weights, moetrain, transformers_eager
from benchmarks.timing import peak_memory, time_in_turn

CPU = torch.device("cpu")
SHAPE = Shape(dim=16, hidden=24, experts=6, top_k=2, tokens=30)
# torchtitan is left out: its installation needs a network and a gigabyte.
IMPLEMENTATIONS = ("moetrain", "transformers-eager", "transformers-grouped_mm")
KEYS = {
    "benchmark",
    "case",
    "implementation",
    "seconds",
    "ratio_to_limit",
    "ratio_to_fastest_limit",
    "rounds",
    "gflops_per_second",
    "peak_memory_bytes",
    "max_over_mean_load",
    "relative_difference",
}


def records_of(routing: str) -> list[dict[str, Any]]:
    case = moe_layer.Case(shape=SHAPE, dtype="float32", device=CPU, threads=2, routing=routing)
    return moe_layer.measure(case, implementations=IMPLEMENTATIONS, seconds=0, rounds=2)


@pytest.mark.parametrize("routing", ["learned", "forced"])
def test_all_implementations_compute_the_same_function(routing: str) -> None:
    # Ten rounded operations on the way to a gradient, of sums as long as the longest here;
    # their errors add up like a random walk.
    tolerance = 10 * torch.finfo(torch.float32).eps * math.sqrt(SHAPE.rows)
    records = [r for r in records_of(routing) if not r["implementation"].startswith("limit")]
    assert len(records) == len(IMPLEMENTATIONS)
    for record in records:
        for name, difference in record["relative_difference"].items():
            assert difference < tolerance, (record["implementation"], name)


def test_forced_routing_is_balanced_and_learned_routing_is_not() -> None:
    assert {r["max_over_mean_load"] for r in records_of("forced")} == {1.0}
    assert all(r["max_over_mean_load"] > 1.0 for r in records_of("learned"))


def test_the_command_prints_an_object_a_line_with_ratios_to_the_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "set_num_threads", lambda threads: None
    )  # the test process keeps its own
    shape = ["--shapes", str(SHAPE), "--routing", "learned", "--rounds", "3"]
    moe_layer.main([*shape, "--implementations", *IMPLEMENTATIONS, "megablocks"])
    output = capsys.readouterr()
    records = [json.loads(line) for line in output.out.splitlines()]
    assert all(set(record) == KEYS for record in records)
    limit = records[0]
    assert limit["implementation"] == "limit"
    assert limit["case"]["routing"] == "learned"
    for record in records:
        assert record["ratio_to_limit"] == limit["seconds"][1] / record["seconds"][1]
        assert record["seconds"] == sorted(record["seconds"])
    limits = [r for r in records if r["implementation"].startswith("limit")]
    fastest = min(record["seconds"][1] for record in limits)
    for record in records:
        assert record["ratio_to_fastest_limit"] == fastest / record["seconds"][1]
    assert all(r["peak_memory_bytes"] > 0 for r in records if r not in limits)
    assert "megablocks is left out: its kernels need a GPU" in output.err
    assert "| transformers" in output.err


def test_the_limit_has_the_flops_of_a_layer_without_its_router() -> None:
    with FlopCounterMode(display=False) as limit:
        Limit(SHAPE, dtype=torch.float32, device=CPU)()
    assert limit.get_total_flops() == SHAPE.flops

    weights = Weights.random(SHAPE, dtype=torch.float32, device=CPU)
    x = torch.randn(SHAPE.tokens, SHAPE.dim, requires_grad=True)
    layer = transformers_eager(SHAPE, weights, None)
    with FlopCounterMode(display=False) as whole:
        layer.forward(x).sum().backward()
    router = 3 * 2 * SHAPE.tokens * SHAPE.dim * SHAPE.experts
    assert whole.get_total_flops() == SHAPE.flops + router


def test_peak_memory_sees_what_was_held_together_and_what_was_freed() -> None:
    mebibyte = 2**18  # float32 values

    def run() -> None:
        first = torch.empty(3 * mebibyte)
        del first
        second = torch.empty(mebibyte)
        third = second + second
        del second, third

    assert peak_memory(run, CPU) == 3 * 2**20


def test_peak_memory_counts_the_gradients_of_all_weights() -> None:
    weights = Weights.random(SHAPE, dtype=torch.float32, device=CPU)
    layer = moetrain(SHAPE, weights, None)
    x = torch.randn(SHAPE.tokens, SHAPE.dim, requires_grad=True)
    gradients = 4 * (x.numel() + sum(p.numel() for p in layer.parameters))
    assert peak_memory(lambda: layer.forward(x).sum().backward(), CPU) > gradients


def test_each_round_runs_every_pass_once_and_warm_up_is_left_out() -> None:
    ran: list[str] = []
    passes = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    taken = time_in_turn(passes, rounds=4, warmup=1, device=CPU)
    assert {name: len(seconds) for name, seconds in taken.items()} == dict.fromkeys("abc", 4)
    rounds = [sorted(ran[i : i + 3]) for i in range(0, 15, 3)]
    assert rounds == [list("abc")] * 5
    assert median(taken["a"]) > 0


@pytest.mark.parametrize("text", ["1,2,3", "8,8,4,5,8", "8,8,0,0,8"])
def test_an_impossible_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Shape.parse(text)
