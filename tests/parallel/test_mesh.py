"""Process groups: what NCCL is told at the start, and which groups the ranks make."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.parallel import TOKEN_AXES, WEIGHT_AXES, build_meshes, join_ranks
from moetrain.parallel.topology import Topology
from tests.support.ranks import replace_in_rank, run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("rendezvous", ["env://", "tcp://127.0.0.1:0"])
def test_nccl_connects_at_the_start_to_the_ranks_own_device(
    rendezvous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.update(current=device))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **given: seen.update(backend=backend, **given)
    )
    device = torch.device("cuda", 3)
    monkeypatch.setattr("moetrain.parallel.mesh._store", lambda *_, **__: "the store")
    join_ranks(rank=1, world_size=8, rendezvous=rendezvous, device=device, timeout_seconds=9.0)
    assert (seen["current"], seen["device_id"], seen["backend"]) == (
        device,
        device,
        "cpu:gloo,cuda:nccl",
    )
    assert ("init_method" in seen) != ("store" in seen)
    assert seen["timeout"].total_seconds() == 9.0


def groups_made(degrees: dict[str, int]) -> list[tuple[int, ...]]:
    """Returns the ranks of each group that a rank makes; it enters the making of no other."""
    made: list[tuple[int, ...]] = []
    real = dist.new_group

    def new_group(ranks: list[int], **given: Any) -> Any:
        made.append(tuple(ranks))
        assert given["use_local_synchronization"]
        return real(ranks, **given)

    replace_in_rank(dist, "new_group", new_group)
    build_meshes(Topology(**degrees), device=CPU, timeout_seconds=30.0)
    return made


def test_a_rank_makes_one_group_for_each_axis_that_it_is_on() -> None:
    layouts: list[tuple[dict[str, int], list[tuple[int, ...]]]] = [
        ({"data_shard": 4}, []),
        ({"data_shard": 4, "expert": 2}, [(1, 3), (0, 1)]),
        # An expert's shard is one rank; FSDP asks its group for the size, and no more.
        ({"data_shard": 4, "expert": 4}, [(1,)]),
        ({"data_replicate": 2, "data_shard": 2, "expert": 2}, [(1, 3), (0, 1), (1,)]),
        ({"data_replicate": 4}, [(1,)]),
    ]
    for degrees, expected in layouts:
        assert run_ranks(groups_made, 4, degrees)[1] == expected, degrees


def sums(degrees: dict[str, int]) -> tuple[list[float], list[list[float]]]:
    meshes = build_meshes(Topology(**degrees), device=CPU)
    mine = torch.tensor([1.0 + dist.get_rank()], dtype=torch.float64)
    # Replicas hold the same shards.
    shard = torch.tensor([10.0 ** meshes.share.at("data_shard")], dtype=torch.float64)
    apart = [meshes.sum(mine, over=TOKEN_AXES), meshes.sum(shard, over=WEIGHT_AXES)]
    together = meshes.sum_together((mine, TOKEN_AXES), (shard, WEIGHT_AXES))
    return [x.item() for x in apart], [x.tolist() for x in together]


@pytest.mark.parametrize(
    ("degrees", "weights"),
    [({"data_shard": 4}, 1111.0), ({"data_replicate": 2, "data_shard": 2}, 11.0),
     ({"data_replicate": 4}, 1.0)],
)  # fmt: skip
def test_sums_over_different_axes_in_one_collective_are_those_of_two(
    degrees: dict[str, int], weights: float
) -> None:
    for apart, together in run_ranks(sums, 4, degrees):
        assert apart == [10.0, weights]
        assert together == [[10.0], [weights]]
