"""The exchange on real ranks against a dense loop over all experts: order, values, gradients."""

import gc
import logging
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.timing import held_memory
from moetrain.kernels import Assignments, expert_swiglu, gather_rows, sum_assignments
from moetrain.parallel import AllToAllExchange, any_rank
from moetrain.settings import ExchangeSettings
from tests.support.ranks import replace_in_rank, run_ranks, world_group

NUM_EXPERTS, DIM, TOP_K = 8, 10, 3


def choices(case: str, rank: int) -> torch.Tensor:
    """Returns the experts of a rank's tokens; [tokens, top_k]."""
    generator = torch.Generator().manual_seed(rank)
    if case == "uneven":  # another number of tokens on each rank
        tokens = 5 + 3 * rank
        return torch.rand(tokens, NUM_EXPERTS, generator=generator).topk(TOP_K).indices
    if case == "all to the last experts":
        return torch.arange(NUM_EXPERTS - TOP_K, NUM_EXPERTS).repeat(6, 1)
    if case == "one token in all":
        return torch.tensor([[0, 3, 7]])[: 1 if rank == 0 else 0]
    if case == "no token at all":
        return torch.zeros(0, TOP_K, dtype=torch.int64)
    raise AssertionError(case)


class Wire:
    """Counts what this rank's collectives carry to other ranks, without changing them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        self.rounds = 0
        self.log: list[str] = []
        real = dist.all_to_all_single

        def counted(out: Tensor, x: Tensor, receive: Any, send: Any, **options: Any) -> Any:
            if x.shape[1] == DIM:
                self.rows += sum(n for to, n in enumerate(send) if to != dist.get_rank())
                self.rounds += 1
                self.log.append("rows")
            return real(out, x, receive, send, **options)

        monkeypatch.setattr(dist, "all_to_all_single", counted)


def exchange_as_rank(case: str, settings: ExchangeSettings) -> dict[str, Any]:
    """Sends tokens to experts that scale and shift by their id; checks against a loop."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    experts = choices(case, rank)
    x = torch.randn(len(experts), DIM, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(len(experts), TOP_K, dtype=torch.float64, requires_grad=True)
    beside = torch.randn(len(experts), DIM, dtype=torch.float64, requires_grad=True)
    scales = torch.linspace(1, 2, NUM_EXPERTS, dtype=torch.float64)
    local = NUM_EXPERTS // world
    weight = scales[rank * local : (rank + 1) * local].clone().requires_grad_()
    loads = []

    def compute(rows: Tensor, gates: Tensor, assignments: Assignments) -> Tensor:
        assert len(assignments.counts) == local
        assert len(assignments.row) == int(assignments.counts.sum())
        loads.append(len(assignments.row))
        wire.log.append("compute")
        y = (
            gather_rows(rows, assignments) * weight.repeat_interleave(assignments.counts)[:, None]
            + 1.0
        )
        return sum_assignments(y, assignments, gates)

    with pytest.MonkeyPatch.context() as monkeypatch:
        wire = Wire(monkeypatch)
        exchange = AllToAllExchange(
            num_experts=NUM_EXPERTS, group=world_group(), layer=7, settings=settings
        )

        def beside_the_experts() -> Tensor:
            wire.log.append("beside")
            return beside * 2

        out = exchange.run(x, experts, gates, compute=compute, beside=beside_the_experts)
        grad = torch.randn_like(out)
        forward = (wire.rows, wire.rounds, list(loads), list(wire.log))
        out.backward(grad)

    expected = beside * 2 + sum(
        gates[:, k, None] * (x * scales[experts[:, k], None] + 1.0) for k in range(TOP_K)
    )
    torch.testing.assert_close(out, expected)
    inputs = (x, gates, beside)
    mine = torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(tuple(t.grad for t in inputs), mine)
    # What this rank's tokens contribute to every expert's gradient: summed over ranks, it is
    # what the experts' own ranks must have found, with no other scale.
    contribution = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
    for k in range(TOP_K):
        contribution.index_add_(0, experts[:, k], (gates[:, k, None] * x * grad).sum(1).detach())
    dist.all_reduce(contribution)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, contribution[rank * local : (rank + 1) * local])
    seen = dict(zip(("rows", "rounds", "loads", "log"), forward, strict=True))
    return seen | {"all_loads": loads}


SETTINGS = {
    "once": ExchangeSettings(max_load=8),
    "each assignment": ExchangeSettings(max_load=8, send_once=False),
    "three rounds": ExchangeSettings(max_load=8, num_rounds=3),
    "bounded": ExchangeSettings(max_load=1.0),
}


CASES = ("uneven", "all to the last experts", "one token in all", "no token at all")


def all_cases_as_rank(settings: ExchangeSettings) -> dict[str, dict[str, Any]]:
    return {case: exchange_as_rank(case, settings) for case in CASES}


@pytest.mark.trap(6, 10)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_token_meets_its_experts_and_comes_back(settings: str, world: int) -> None:
    ranks = run_ranks(all_cases_as_rank, world, SETTINGS[settings])
    for case in CASES:
        seen = [rank[case] for rank in ranks]
        arrived = sum(sum(rank["loads"]) for rank in seen)
        assert arrived == sum(choices(case, rank).numel() for rank in range(world))
        there_and_back = 2 * (3 if settings == "three rounds" else 1)
        if settings != "bounded":
            assert [rank["rounds"] for rank in seen] == [there_and_back] * world


def test_a_round_travels_while_the_one_before_computes() -> None:
    settings = ExchangeSettings(max_load=8, num_rounds=3)
    for rank in run_ranks(exchange_as_rank, 2, "uneven", settings):
        there, back = "rows", "rows"
        assert rank["log"] == [
            *(there, "beside"),
            *(there, "compute", back),
            *(there, "compute", back),
            *("compute", back),
        ]


READS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__")


def count_host_reads(settings: ExchangeSettings) -> list[str]:
    """Returns the ways in which a forward and backward pass asks for a tensor's values."""
    experts = choices("uneven", dist.get_rank())
    x = torch.randn(len(experts), DIM, requires_grad=True)
    gates = torch.rand(len(experts), TOP_K, requires_grad=True)
    exchange = AllToAllExchange(
        num_experts=NUM_EXPERTS, group=world_group(), layer=0, settings=settings
    )
    reads: list[str] = []
    originals = {name: getattr(Tensor, name) for name in READS}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in READS:

            def read(self: Tensor, *args: Any, name: str = name) -> Any:
                reads.append(name)
                return originals[name](self, *args)

            monkeypatch.setattr(Tensor, name, read)
        out = exchange.run(
            x,
            experts,
            gates,
            compute=lambda rows, gates, assignments: sum_assignments(
                gather_rows(rows, assignments), assignments, gates
            ),
        )
        out.backward(torch.ones_like(out))
    return reads


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_host_reads_from_the_device_once(settings: str) -> None:
    assert run_ranks(count_host_reads, 2, SETTINGS[settings]) == [["cpu", "numpy"]] * 2


def fewest_rows(case: str, world: int, *, once: bool) -> int:
    """Returns how many rows must cross between ranks, there and back, all ranks together."""
    rows = 0
    for rank in range(world):
        for chosen in (choices(case, rank) // (NUM_EXPERTS // world)).tolist():
            away = [owner for owner in chosen if owner != rank]
            rows += 2 * (len(set(away)) if once else len(away))
    return rows


@pytest.mark.parametrize("once", [True, False])
def test_no_more_rows_travel_than_must(once: bool) -> None:
    settings = ExchangeSettings(max_load=8, send_once=once)
    seen = run_ranks(exchange_as_rank, 2, "uneven", settings)
    assert sum(rank["rows"] for rank in seen) == fewest_rows("uneven", 2, once=once)
    assert fewest_rows("uneven", 2, once=True) < fewest_rows("uneven", 2, once=False)


@pytest.mark.trap(18)
def test_a_rank_takes_a_bounded_number_of_rows_at_once_and_drops_none() -> None:
    """All tokens to the last rank of four: four times its fair share, at most one at once."""
    case, world = "all to the last experts", 4
    seen = run_ranks(exchange_as_rank, world, case, ExchangeSettings(max_load=1.0))
    total = sum(choices(case, rank).numel() for rank in range(world))
    fair_share = total // world
    busiest = max(seen, key=lambda rank: sum(rank["loads"]))
    assert sum(busiest["loads"]) >= 2 * fair_share
    # A round cuts every rank's rows apart, so that each may add one.
    assert max(busiest["loads"]) <= fair_share + world
    # Every round was computed again: its activations weren't kept.
    assert busiest["all_loads"] == busiest["loads"] + busiest["loads"][::-1]


def hold_as_rank(settings: ExchangeSettings) -> tuple[int, int]:
    """Returns the bytes held after experts of width 64 · DIM ran forward, and the assignments."""
    torch.manual_seed(dist.get_rank())
    experts = torch.tensor([[6, 7]] * 200)
    x = torch.randn(len(experts), DIM, requires_grad=True)
    gates = torch.rand(len(experts), 2, requires_grad=True)
    weights = [torch.randn(2, 64 * DIM, DIM, requires_grad=True) for _ in range(3)]
    exchange = AllToAllExchange(num_experts=8, group=world_group(), layer=0, settings=settings)
    received = []

    def compute(rows: Tensor, gates: Tensor, assignments: Assignments) -> Tensor:
        received.append(len(assignments.row))
        return expert_swiglu(rows, gates, assignments, *weights)

    outputs = []

    def forward() -> None:
        outputs.append(exchange.run(x, experts, gates, compute=compute))

    held = held_memory(forward, torch.device("cpu"))
    outputs[0].sum().backward()
    return held, sum(received) // 2 if settings.max_load == 1 else sum(received)


@pytest.mark.trap(18)
def test_rounds_keep_nothing_of_what_a_rank_received() -> None:
    """On the busiest rank: no product of the experts, and no row beyond its own tokens'."""
    kept, assignments = run_ranks(hold_as_rank, 4, ExchangeSettings(max_load=8))[3]
    assert assignments == 4 * 200 * 2
    assert kept >= assignments * 2 * 64 * DIM * 4, "the gate and up products of all assignments"
    bounded, again = run_ranks(hold_as_rank, 4, ExchangeSettings(max_load=1))[3]
    assert again == assignments
    # Its own 400 assignments to send, once as rows and once as results; routing metadata, indices.
    assert bounded < 400 * (2 * DIM + 40) * 4 < assignments * 2 * 64 * DIM * 4 / 20


def live_transfers() -> list[int]:
    """Returns how many transfers live after each of some steps, without the garbage collector."""
    experts = choices("uneven", dist.get_rank())
    exchange = AllToAllExchange(num_experts=NUM_EXPERTS, group=world_group(), layer=0)
    gc.collect()
    gc.disable()
    living: list[int] = []
    made: list[weakref.ref[Any]] = []
    real = exchange._transfer

    def transfer(*arguments: Any) -> Any:
        made.append(weakref.ref(result := real(*arguments)))
        return result

    replace_in_rank(exchange, "_transfer", transfer)
    for _ in range(3):
        x = torch.randn(len(experts), DIM, requires_grad=True)
        gates = torch.rand(len(experts), TOP_K, requires_grad=True)
        out = exchange.run(x, experts, gates, compute=lambda rows, gates, assignments: rows * 2)
        out.sum().backward()
        del out
        # gloo's threads drop the tensors that they sent a moment after a wait for them returns, and
        # a cycle of references is never dropped.
        until = time.monotonic() + 10
        while (alive := sum(ref() is not None for ref in made)) and time.monotonic() < until:
            time.sleep(0.001)
        living.append(alive)
    gc.enable()
    return living


def test_a_step_leaves_no_transfer_behind_for_the_garbage_collector() -> None:
    assert run_ranks(live_transfers, 2) == [[0, 0, 0]] * 2


def warn_as_rank() -> list[str]:
    """Returns what a rank says when all tokens go to the last one's experts."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("moetrain.parallel").addHandler(handler)
    exchange = AllToAllExchange(num_experts=8, group=world_group(), layer=5)
    x, experts = torch.randn(10, DIM), torch.tensor([[6, 7]] * 10)
    gates = torch.ones(10, 2)
    for _ in range(2):
        exchange.run(x, experts, gates, compute=lambda rows, gates, assignments: rows)
    return said


@pytest.mark.trap(18)
def test_an_imbalance_is_told_once_with_layer_rank_and_counts() -> None:
    *others, last = run_ranks(warn_as_rank, 4)
    assert others == [[], [], []]
    assert last == [
        "token all-to-all of layer 5: rank 3 receives 80 token–expert assignments, where a fair "
        "share is 20; taken in 2 rounds"
    ]


def disagree_as_rank() -> str:
    """Rank 1 has rows of another width."""
    exchange = AllToAllExchange(num_experts=4, group=world_group(), layer=2)
    x = torch.randn(3, DIM + dist.get_rank())
    try:
        exchange.run(x, torch.tensor([[0, 2]] * 3), torch.ones(3, 2), compute=lambda rows, *_: rows)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_ranks_that_disagree_are_told_before_a_token_travels() -> None:
    for said in run_ranks(disagree_as_rank, 2):
        assert "token all-to-all of layer 2" in said
        assert "don't agree on (dim, bytes per number, top_k): [[10, 4, 2], [11, 4, 2]]" in said


def lose_a_peer() -> str:
    """Rank 1 leaves while rank 0 computes; rank 0 says what it was doing."""
    exchange = AllToAllExchange(num_experts=4, group=world_group(), layer=3)

    def compute(rows: Tensor, gates: Tensor, assignments: Assignments) -> Tensor:
        if dist.get_rank() == 1:
            dist.destroy_process_group()
            raise KeyboardInterrupt
        return rows

    try:
        exchange.run(
            torch.randn(5, DIM), torch.tensor([[0, 2]] * 5), torch.ones(5, 2), compute=compute
        )
    except KeyboardInterrupt:
        return "left"
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_lost_peer_is_reported_with_layer_rank_and_row_counts() -> None:
    said = run_ranks(lose_a_peer, 2)[0]
    assert "token all-to-all of layer 3 on rank 0" in said
    assert "sending [5, 5] and receiving [5, 5]" in said


def raise_a_flag(which: int) -> bool:
    """Returns what all ranks agree on when one of them (or none) raises the flag."""
    return any_rank(dist.get_rank() == which)


def test_a_flag_on_one_rank_is_seen_by_all() -> None:
    assert run_ranks(raise_a_flag, 3, 2) == [True] * 3
    assert run_ranks(raise_a_flag, 3, -1) == [False] * 3
