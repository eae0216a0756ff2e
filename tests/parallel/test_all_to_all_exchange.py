"""The exchange on real ranks against a dense loop over all experts: order, values, gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.model import Routing
from moetrain.model.router import RoutingStatistics
from moetrain.parallel import AllToAllExchange, any_rank
from tests.support.ranks import run_ranks

NUM_EXPERTS, DIM, TOP_K = 8, 6, 3
NO_STATISTICS = RoutingStatistics(*[torch.zeros(())] * 4)


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


def exchange_as_rank(case: str) -> Any:
    """Sends tokens through experts that scale and shift by their id; checks against a loop."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    experts = choices(case, rank)
    x = torch.randn(len(experts), DIM, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(len(experts), TOP_K, dtype=torch.float64, requires_grad=True)
    scales = torch.linspace(1, 2, NUM_EXPERTS, dtype=torch.float64)
    local = NUM_EXPERTS // world
    weight = scales[rank * local : (rank + 1) * local].clone().requires_grad_()

    exchange = AllToAllExchange(num_experts=NUM_EXPERTS, group=dist.group.WORLD, layer=7)
    received = exchange.dispatch(x, Routing(experts, gates, NO_STATISTICS))
    assert received.rows.shape[0] == int(received.counts.sum())
    assert len(received.counts) == local
    y = received.rows * weight.repeat_interleave(received.counts)[:, None] + 1.0
    out = exchange.combine(y, received)
    grad = torch.randn_like(out)
    out.backward(grad)

    expected = sum(
        gates[:, k, None] * (x * scales[experts[:, k], None] + 1.0) for k in range(TOP_K)
    )
    torch.testing.assert_close(out, expected)
    mine = torch.autograd.grad(expected, (x, gates), grad)
    torch.testing.assert_close((x.grad, gates.grad), mine)
    # What this rank's tokens contribute to every expert's gradient: summed over ranks, it is
    # what the experts' own ranks must have found, with no other scale.
    contribution = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
    for k in range(TOP_K):
        contribution.index_add_(0, experts[:, k], (gates[:, k, None] * x * grad).sum(1).detach())
    dist.all_reduce(contribution)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, contribution[rank * local : (rank + 1) * local])
    return int(received.counts.sum())


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "case", ["uneven", "all to the last experts", "one token in all", "no token at all"]
)
def test_every_token_meets_its_experts_and_comes_back(case: str, world: int) -> None:
    arrived = run_ranks(exchange_as_rank, world, case)
    assert sum(arrived) == sum(choices(case, rank).numel() for rank in range(world))


def lose_a_peer() -> str:
    """Rank 1 leaves before the exchange; rank 0 says what it was doing."""
    rank = dist.get_rank()
    exchange = AllToAllExchange(num_experts=4, group=dist.group.WORLD, layer=3)
    experts = torch.tensor([[0, 2]] * 5)
    routing = Routing(experts, torch.ones(5, 2), NO_STATISTICS)
    x = torch.randn(5, DIM)
    received = exchange.dispatch(x, routing)
    if rank == 1:
        dist.destroy_process_group()
        return "left"
    try:
        for _ in range(3):
            exchange.combine(received.rows, received)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_lost_peer_is_reported_with_layer_rank_and_row_counts() -> None:
    said = run_ranks(lose_a_peer, 2)[0]
    assert "token all-to-all of layer 3 on rank 0" in said
    assert "sending [5, 5] and receiving [5, 5]" in said


def raise_a_flag(which: int) -> bool:
    """Returns what all ranks agree on when one of them (or none) raises the flag."""
    return any_rank(dist.get_rank() == which, device=torch.device("cpu"))


def test_a_flag_on_one_rank_is_seen_by_all() -> None:
    assert run_ranks(raise_a_flag, 3, 2) == [True] * 3
    assert run_ranks(raise_a_flag, 3, -1) == [False] * 3
