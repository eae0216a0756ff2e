"""Process groups: joining the ranks, and the two views of them as device meshes."""

import datetime
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from moetrain.parallel.topology import DENSE_AXES, RankShare, Topology


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """The dense and the expert view of all ranks, as one rank sees them.

    An axis of one rank has no process group and takes no collective. The exceptions are the axes
    that FSDP shards over: it needs a group of one rank then, and does nothing with it.
    """

    topology: Topology
    rank: int
    dense: DeviceMesh
    """The axes over which FSDP holds dense weights: data_shard, after data_replicate if that is
    wider than one rank."""
    expert: DeviceMesh
    """The same axes of the experts, with expert_shard. The axis `expert` comes last, if wider than
    one rank."""

    @property
    def share(self) -> RankShare:
        """This rank's share of the work."""
        return self.topology.of(self.rank)

    @property
    def of_experts(self) -> DeviceMesh:
        """The axes of `expert` over which FSDP holds the experts of one rank of that axis."""
        names = self.expert.mesh_dim_names or ()
        return self.expert[tuple(name for name in names if name != "expert")]

    @property
    def expert_axis(self) -> DeviceMesh | None:
        """The ranks that together hold one copy of all experts; None: this rank holds them."""
        return self.expert["expert"] if self.topology.expert > 1 else None

    def sum(self, values: Tensor, *, over: tuple[str, ...]) -> Tensor:
        """Returns the sum over the ranks along some axes, the same bits on each of them.

        The input is left alone. Raises ValueError where no group of exactly these ranks was made.
        """
        total = values.detach().clone()
        wide = [axis for axis in over if getattr(self.topology, axis) > 1]
        if wide == [axis for axis in DENSE_AXES if getattr(self.topology, axis) > 1]:
            group = None  # all ranks
        elif len(wide) > 1:
            raise ValueError(f"no process group was made along {', '.join(wide)}")
        else:
            group = self.dense[wide[0]].get_group() if wide else None
        if wide:
            dist.all_reduce(total, group=group)
        return total

    def sum_together(self, *parts: tuple[Tensor, tuple[str, ...]]) -> list[Tensor]:
        """Returns each tensor's sum over the ranks along its axes, by one collective for all.

        Along all other axes the ranks hold equal values, of which the first rank's are taken.
        Tensors are of one dtype and one dimension.
        """
        share, mine = self.share, []
        for values, over in parts:
            first = not any(share.at(axis) for axis in DENSE_AXES if axis not in over)
            mine.append(values if first else torch.zeros_like(values))
        return list(self.sum(torch.cat(mine), over=DENSE_AXES).split([len(v) for v in mine]))


def join_ranks(
    *,
    rank: int,
    world_size: int,
    rendezvous: str,
    device: torch.device,
    timeout_seconds: float,
) -> None:
    """Joins the world's process group; `rendezvous` is an address, as torch's `init_method`.

    Each attempt needs a new address: ranks that survived an older attempt must not find it.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    meeting: dict[str, Any] = {"init_method": rendezvous}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # NCCL connects now, so that a bad card or network card is an error of the start, and
        # the groups of the meshes are splits of this communicator.
        meeting |= {"device_id": device}
    if rendezvous.startswith("tcp://"):
        del meeting["init_method"]
        meeting["store"] = _store(rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        **meeting,
    )


def _store(
    rendezvous: str, *, rank: int, world_size: int, timeout: datetime.timedelta
) -> dist.TCPStore:
    """Returns the rendezvous store; the first rank serves it, and at that address only.

    By default torch listens on all interfaces. Anyone who can write to the store can make ranks
    connect to them, and send pickled objects.
    """
    place = urlsplit(rendezvous)
    assert place.hostname is not None
    assert place.port is not None
    served = None
    if rank == 0:
        family = socket.getaddrinfo(place.hostname, place.port, type=socket.SOCK_STREAM)[0][0]
        served = socket.create_server((place.hostname, place.port), family=family).detach()
    return dist.TCPStore(
        place.hostname,
        place.port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=served,
    )


def build_meshes(
    topology: Topology, *, device: torch.device, timeout_seconds: float | None = None
) -> Meshes:
    """Returns the two views of the world's ranks, as `topology` lays them out.

    `timeout_seconds` is the timeout of their collectives; None: torch's default, half an hour.

    A rank makes one group for each axis, with its own members only: torch's meshes have every rank
    enter the making of every group, so that a start takes longer the more ranks there are. With
    NCCL it is one split of the world's communicator for each axis, which all ranks take together.
    """
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    rank, world = dist.get_rank(), tuple(range(dist.get_world_size()))
    assert dist.group.WORLD is not None
    groups[world] = dist.group.WORLD
    timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
    if timeout is not None:
        _set_pg_timeout(timeout, dist.group.WORLD)

    def group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
        if ranks not in groups:
            made = dist.new_group(
                list(ranks),
                timeout=timeout,
                # FSDP asks a group of one rank for its size only.
                backend="gloo" if len(ranks) == 1 and device.type == "cuda" else None,
                use_local_synchronization=True,
            )
            assert made is not None
            groups[ranks] = made
        return groups[ranks]

    def mesh(axes: tuple[str, ...], sharded: str) -> DeviceMesh:
        names = [a for a in axes if getattr(topology, a) > 1 or a == sharded]
        ranks = torch.arange(len(world)).view(topology.degrees(tuple(names)))
        (place,) = (ranks == rank).nonzero().tolist()
        along = [
            group(tuple(ranks[(*place[:i], slice(None), *place[i + 1 :])].tolist()))
            for i in range(len(names))
        ]
        if len(along) == 1:
            return DeviceMesh.from_group(along[0], device.type, mesh_dim_names=tuple(names))
        return DeviceMesh.from_group(along, device.type, mesh=ranks, mesh_dim_names=tuple(names))

    return Meshes(
        topology=topology,
        rank=rank,
        dense=mesh(("data_replicate", "data_shard"), "data_shard"),
        expert=mesh(("data_replicate", "expert_shard", "expert"), "expert_shard"),
    )
