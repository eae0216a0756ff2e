"""Which rank does what: pure arithmetic from degrees to layouts. Knows no process group.

One world of ranks is seen in two views. The dense view has the axes (pipeline, data_replicate,
data_shard, context, tensor). The expert view folds the last three of them into (expert_shard,
expert), so that experts need no ranks of their own (arXiv 2504.14960, "folding"). The last axis
varies fastest: the ranks that exchange tokens are neighbours, inside one node where they fit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moetrain.checks import ConfigError
from moetrain.settings.parallel import ParallelSettings

DENSE_AXES = ("pipeline", "data_replicate", "data_shard", "context", "tensor")
EXPERT_AXES = ("pipeline", "data_replicate", "expert_shard", "expert")
BATCH_AXES = ("data_replicate", "data_shard")
"""Along these axes every rank reads its own sequences."""
TOKEN_AXES = (*BATCH_AXES, "context")
"""Along these axes every rank has its own tokens."""
WEIGHT_AXES = ("data_shard", "context", "tensor")
"""Along these axes, and over the pipeline stages, one copy of the weights is sharded."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A valid layout, by its degrees."""

    pipeline: int = 1
    data_replicate: int = 1
    data_shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def expert_shard(self) -> int:
        """Ranks over which the experts of one rank of the expert axis are sharded."""
        return self.data_shard * self.context * self.tensor // self.expert

    @property
    def num_ranks(self) -> int:
        """All ranks."""
        return math.prod(self.degrees(DENSE_AXES))

    @property
    def num_batch_ranks(self) -> int:
        """The number of parts in which a global batch is read."""
        return math.prod(self.degrees(BATCH_AXES))

    def degrees(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        """Returns the degrees of some axes."""
        return tuple(getattr(self, axis) for axis in axes)

    def of(self, rank: int) -> "RankShare":
        """Returns a rank's share of the work."""
        return RankShare(topology=self, rank=rank)


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """One rank's share of the work: of a batch, of a sequence, of the model."""

    topology: Topology
    rank: int

    def at(self, axis: str) -> int:
        """Returns the rank's coordinate on an axis of either view."""
        axes = DENSE_AXES if axis in DENSE_AXES else EXPERT_AXES
        inner = axes[axes.index(axis) + 1 :]
        step = math.prod(self.topology.degrees(inner))
        (degree,) = self.topology.degrees((axis,))
        return self.rank // step % degree

    @property
    def batch_rank(self) -> int:
        """Which part of each global batch it reads, of `topology.num_batch_ranks`."""
        return self.at("data_replicate") * self.topology.data_shard + self.at("data_shard")

    def sequences(self, global_batch_size: int) -> range:
        """Returns the sequences of a global batch that it reads."""
        return _part(global_batch_size, self.batch_rank, self.topology.num_batch_ranks)

    def positions(self, seq_len: int) -> range:
        """Returns the positions of a sequence that it has."""
        return _part(seq_len, self.at("context"), self.topology.context)

    def layers(self, num_layers: int) -> range:
        """Returns the numbers of the layers that it computes."""
        return _part(num_layers, self.at("pipeline"), self.topology.pipeline)

    def heads(self, num_heads: int) -> range:
        """Returns the attention heads that it computes."""
        return _part(num_heads, self.at("tensor"), self.topology.tensor)

    def experts(self, num_experts: int) -> range:
        """Returns the global ids of the experts that it holds, whole or a shard of each."""
        return _part(num_experts, self.at("expert"), self.topology.expert)


def _part(number: int, index: int, parts: int) -> range:
    size = number // parts
    return range(index * size, (index + 1) * size)


def degree_choices(num_ranks: int) -> Iterator[tuple[int, int]]:
    """Yields all (data_replicate, expert) degrees of so many ranks, the smaller ones first.

    `resolve_topology` decides whether a model fits them.
    """
    for replicate in divisors(num_ranks):
        for expert in divisors(num_ranks // replicate):
            yield replicate, expert


def resolve_topology(
    settings: ParallelSettings,
    *,
    world_size: int,
    num_experts: int,
    ffn_hidden_dim: int,
    ranks_per_node: int,
) -> Topology:
    """Returns the layout of the settings for so many ranks.

    If None, `data_shard_degree` takes all ranks that the other degrees leave, and
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
    return Topology(data_replicate=replicate, data_shard=shard, expert=expert)


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]
