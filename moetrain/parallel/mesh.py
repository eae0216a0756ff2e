"""Process groups: joining the ranks, and the two views of them as device meshes."""

import datetime
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from moetrain.parallel.topology import DENSE_AXES, RankShare, Topology


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """The dense and the expert view of all ranks, as one rank sees them."""

    topology: Topology
    rank: int
    dense: DeviceMesh
    """Axes (data_replicate, data_shard)."""
    expert: DeviceMesh
    """Axes (data_replicate, expert_shard, expert)."""

    @property
    def share(self) -> RankShare:
        """This rank's share of the work."""
        return self.topology.of(self.rank)

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """The ranks that together hold one copy of all experts and exchange tokens."""
        return self.expert["expert"].get_group()

    def group(self, axes: tuple[str, ...]) -> dist.ProcessGroup | None:
        """Returns the ranks that differ from this one along some axes only; None: all ranks.

        Raises ValueError where no group of exactly these ranks was made.
        """
        wide = [axis for axis in axes if getattr(self.topology, axis) > 1]
        if wide == [axis for axis in DENSE_AXES if getattr(self.topology, axis) > 1]:
            return None
        if len(wide) > 1:
            raise ValueError(f"no process group was made along {', '.join(wide)}")
        # Where all degrees are 1, any of the axes: its group is this rank alone.
        axis = wide[0] if wide else next(a for a in axes if a in ("data_replicate", "data_shard"))
        return self.dense[axis].get_group()

    def sum(self, values: Tensor, *, over: tuple[str, ...]) -> Tensor:
        """Returns the sum over the ranks along some axes, the same bits on each of them.

        The input is left alone.
        """
        total = values.detach().clone()
        dist.all_reduce(total, group=self.group(over))
        return total


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
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    meeting: dict[str, Any] = {"init_method": rendezvous}
    if rendezvous.startswith("tcp://"):
        meeting = {"store": _store(rendezvous, rank=rank, world_size=world_size, timeout=timeout)}
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
    """
    dense = init_device_mesh(
        device.type,
        (topology.data_replicate, topology.data_shard),
        mesh_dim_names=("data_replicate", "data_shard"),
    )
    expert = init_device_mesh(
        device.type,
        (topology.data_replicate, topology.expert_shard, topology.expert),
        mesh_dim_names=("data_replicate", "expert_shard", "expert"),
    )
    if timeout_seconds is not None:
        for group in {*dense.get_all_groups(), *expert.get_all_groups()}:
            _set_pg_timeout(datetime.timedelta(seconds=timeout_seconds), group)  # not inherited
    return Meshes(topology=topology, rank=dist.get_rank(), dense=dense, expert=expert)
