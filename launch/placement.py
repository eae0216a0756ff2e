"""Which node gets how many ranks: pure arithmetic, no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster, and how many ranks it has room for."""

    id: str
    address: str
    room: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """The ranks that a node gets; they have neighbouring numbers."""

    node: Node
    num_ranks: int


def choose_nodes(
    nodes: Sequence[Node],
    *,
    num_ranks: int,
    group_size: int,
    failures: Mapping[str, int] | None = None,
) -> list[Share] | None:
    """Returns a node for every rank, in order of the ranks; None if there is too little room.

    Groups of `group_size` neighbouring ranks exchange tokens: each stays inside a node wherever it
    fits. Nodes with fewer `failures` (by address) come first, and of those the largest, so that few
    nodes are used.
    """
    counted = failures or {}

    def rank(node: Node) -> tuple[int, int, str, str]:
        return counted.get(node.address, 0), -node.room, node.address, node.id

    ordered = sorted((n for n in nodes if n.room > 0), key=rank)
    whole_groups = {n.id: n.room // group_size * group_size for n in ordered}
    for room in (whole_groups, {n.id: n.room for n in ordered}):
        if sum(room.values()) >= num_ranks:
            shares = _fill(ordered, room, num_ranks, counted)
            # Whole groups first: a split group comes last, and shifts no other group.
            return sorted(shares, key=lambda s: (s.num_ranks % group_size != 0, s.node.address))
    return None


def _fill(
    ordered: Sequence[Node], room: Mapping[str, int], num_ranks: int, failures: Mapping[str, int]
) -> list[Share]:
    """Takes nodes in order until all ranks are placed; the last one is the tightest fit."""
    shares: list[Share] = []
    left = num_ranks
    for number, node in enumerate(ordered):
        if room[node.id] >= left:
            fitting = [
                n
                for n in ordered[number:]
                if room[n.id] >= left
                and failures.get(n.address, 0) == failures.get(node.address, 0)
            ]
            tightest = min(fitting, key=lambda n: room[n.id])
            return [*shares, Share(node=tightest, num_ranks=left)]
        if room[node.id]:
            shares.append(Share(node=node, num_ranks=room[node.id]))
            left -= room[node.id]
    raise AssertionError("there was room for all")
