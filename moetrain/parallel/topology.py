"""Which rank does what: pure arithmetic from degrees to layouts. Knows no process group.

One world of ranks is seen in two views. The dense view is (data_replicate, data_shard); the
expert view splits data_shard into (expert_shard, expert), so that experts need no ranks of
their own (arXiv 2504.14960, "folding"). The expert axis varies fastest: the ranks that
exchange tokens are neighbours, inside one node where they fit.
"""

import math
from dataclasses import dataclass

from moetrain.checks import ConfigError
from moetrain.settings.parallel import ParallelSettings


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A valid layout of `world_size` ranks."""

    data_replicate: int
    expert_shard: int
    expert: int

    @property
    def data_shard(self) -> int:
        """Ranks in one replica, each of which has a part of every weight."""
        return self.expert_shard * self.expert

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.data_replicate * self.data_shard

    def experts_of(self, rank: int, *, num_experts: int) -> range:
        """Returns the global ids of the experts that live on a rank."""
        local = num_experts // self.expert
        first = rank % self.expert * local
        return range(first, first + local)


def resolve_topology(
    settings: ParallelSettings,
    *,
    world_size: int,
    num_experts: int,
    ffn_hidden_dim: int,
    ranks_per_node: int,
) -> Topology:
    """Returns the layout that the settings mean for so many ranks.

    Left open, `data_shard_degree` takes all ranks that the other degrees leave, and
    `expert_degree` is the largest that divides both the experts and the shard degree and stays
    inside a node. Raises ConfigError where degrees don't multiply to the world size or don't
    divide what they split.
    """
    for name in ("context_degree", "tensor_degree", "pipeline_degree"):
        if (degree := getattr(settings, name)) != 1:
            raise ConfigError(f"parallel.{name}", degree, "not built yet: use 1")
    replicate = settings.data_replicate_degree
    if world_size % replicate:
        raise ConfigError(
            "parallel.data_replicate_degree", replicate,
            f"does not divide the {world_size} workers: use one of {divisors(world_size)}",
        )  # fmt: skip
    shard = settings.data_shard_degree or world_size // replicate
    if shard * replicate != world_size:
        raise ConfigError(
            "parallel.data_shard_degree", shard,
            f"times data_replicate_degree={replicate} makes {shard * replicate} ranks, but there "
            f"are {world_size} workers: use {world_size // replicate}, or leave it open",
        )  # fmt: skip
    fitting = [
        degree for degree in divisors(math.gcd(shard, num_experts))
        if ffn_hidden_dim % (shard // degree) == 0
    ]  # fmt: skip
    expert = settings.expert_degree
    if expert is None:
        inside = [degree for degree in fitting if degree <= ranks_per_node]
        if not inside:
            raise ConfigError(
                "parallel.expert_degree", None,
                f"no degree fits {num_experts} experts of ffn_hidden_dim={ffn_hidden_dim} on "
                f"{shard} shard ranks (launch.num_workers={world_size}): use a number of workers "
                "that divides one of the two, or more data_replicate_degree",
            )  # fmt: skip
        expert = max(inside)
    if num_experts % expert:
        raise ConfigError(
            "parallel.expert_degree", expert,
            f"does not divide the {num_experts} experts (model.num_experts): use one of {fitting}",
        )  # fmt: skip
    if shard % expert:
        raise ConfigError(
            "parallel.expert_degree", expert,
            f"does not divide the {shard} ranks that share one copy of the weights "
            f"(data_shard_degree): use one of {fitting}",
        )  # fmt: skip
    if ffn_hidden_dim % (shard // expert):
        raise ConfigError(
            "parallel.expert_degree", expert,
            f"leaves {shard // expert} ranks to shard each expert over, which do not divide "
            f"model.ffn_hidden_dim={ffn_hidden_dim}: use one of {fitting}",
        )  # fmt: skip
    return Topology(data_replicate=replicate, expert_shard=shard // expert, expert=expert)


def divisors(number: int) -> list[int]:
    """Returns what a number can be divided by, from 1 up."""
    return [d for d in range(1, number + 1) if number % d == 0]
