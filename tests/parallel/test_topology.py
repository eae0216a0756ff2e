"""Layouts as pure arithmetic."""

from collections import Counter
from itertools import product
from typing import Any

import pytest

from moetrain.checks import ConfigError
from moetrain.parallel import Topology, resolve_topology
from moetrain.settings import ParallelSettings


def resolve(world_size: int, num_experts: int = 8, hidden: int = 256, **degrees: Any) -> Topology:
    return resolve_topology(
        ParallelSettings(**degrees),
        world_size=world_size,
        num_experts=num_experts,
        ffn_hidden_dim=hidden,
        ranks_per_node=8,
    )


@pytest.mark.parametrize(
    ("world_size", "num_experts", "expert"),
    [(1, 8, 1), (2, 8, 2), (8, 8, 8), (64, 8, 8), (64, 64, 8), (6, 8, 2), (4, 1, 1), (3, 8, 1)],
)
def test_an_open_expert_degree_is_the_largest_that_fits_a_node(
    world_size: int, num_experts: int, expert: int
) -> None:
    topology = resolve(world_size, num_experts, hidden=96 * 64)
    assert topology.expert == expert
    assert topology.num_ranks == world_size


def test_every_expert_lives_on_as_many_ranks_as_there_are_copies() -> None:
    topology = resolve(16, expert_degree=4, data_replicate_degree=2)
    owners = [list(topology.of(rank).experts(8)) for rank in range(16)]
    assert owners[:5] == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]]
    for expert in range(8):
        assert sum(expert in owned for owned in owners) == 4


@pytest.mark.parametrize(
    ("settings", "key", "said"),
    [
        ({"world_size": 8, "expert_degree": 3}, "parallel.expert_degree", "8 experts"),
        ({"world_size": 4, "expert_degree": 8}, "parallel.expert_degree", "4 ranks"),
        (
            {"world_size": 4, "hidden": 255, "expert_degree": 2},
            "parallel.expert_degree",
            "ffn_hidden_dim=255",
        ),
        (
            {"world_size": 6, "data_replicate_degree": 4},
            "parallel.data_replicate_degree",
            "6 workers",
        ),
        ({"world_size": 8, "data_shard_degree": 4}, "parallel.data_shard_degree", "use 8"),
        ({"world_size": 8, "tensor_degree": 2}, "parallel.tensor_degree", "use 1"),
    ],
)
def test_an_impossible_layout_names_the_setting_and_a_way_out(
    settings: dict[str, Any], key: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(**settings)
    assert caught.value.key == key
    assert said in str(caught.value)


def test_ranks_share_the_work_so_that_each_part_is_done_once() -> None:
    """Sequences, positions, layers and heads, with every axis in use."""
    topology = Topology(pipeline=2, data_replicate=2, data_shard=2, context=2, tensor=2, expert=4)
    assert (topology.num_ranks, topology.num_batch_ranks, topology.expert_shard) == (32, 4, 2)
    done = Counter(
        part
        for share in map(topology.of, range(32))
        for part in product(share.sequences(8), share.positions(4), share.layers(6), share.heads(4))
    )
    assert done == dict.fromkeys(product(range(8), range(4), range(6), range(4)), 1)
    # Each half of the layers has two replicas, and each of these two shards of every expert.
    experts = Counter(e for share in map(topology.of, range(16)) for e in share.experts(8))
    assert experts == dict.fromkeys(range(8), 4)
