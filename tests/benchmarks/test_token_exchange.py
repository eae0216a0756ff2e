"""The exchange benchmark: bytes counted as they are sent, against the fewest for the routing."""

import torch
import torch.distributed as dist

from benchmarks import token_exchange
from benchmarks.layers import Shape
from tests.support.ranks import run_ranks

SHAPE = Shape(dim=16, hidden=24, experts=8, top_k=2, tokens=32)


def send_known_rows() -> tuple[int, int, int]:
    """Sends three rows to the other rank and keeps one; then a count for each rank."""
    rank = dist.get_rank()
    splits = [1, 3] if rank == 0 else [3, 1]
    rows, counts = torch.ones(4, 16), torch.ones(2, dtype=torch.int64)
    with token_exchange.counting(16) as sent:
        dist.all_to_all_single(torch.empty(4, 16), rows, splits, splits)
        dist.all_to_all_single(torch.empty_like(counts), counts)
    dist.all_reduce(counts)  # after it, the collectives are torch's own again
    return sent.rows, sent.metadata, sent.collectives


def test_only_what_goes_to_other_ranks_is_counted() -> None:
    assert run_ranks(send_known_rows, 2) == [(3 * 16 * 4, 8, 2)] * 2


def test_forced_routing_has_the_minimum_that_follows_from_it() -> None:
    limit, layer, *others = token_exchange.measure(SHAPE, routing="forced", rounds=2)
    # Tokens choose (0, 1), (2, 3), (4, 5), (6, 7) in turn: half of a rank's tokens go to the
    # other, once each; there and back, and their gradients.
    assert limit["row_bytes"] == 2 * 4 * (SHAPE.tokens // 2) * SHAPE.dim * 4
    assert layer["row_bytes"] == limit["row_bytes"]
    assert layer["row_bytes_over_minimum"] == 1.0
    assert len(others) == 2
    assert layer["collectives"] >= 4
    assert layer["ratio_to_limit"] == limit["seconds"][1] / layer["seconds"][1]
    assert {"benchmark", "case", "implementation", "seconds", "overhead_share"} <= set(layer)
