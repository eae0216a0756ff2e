"""Turns the single-device model into this rank's part of it: one ordered list.

Experts → recompute → shard → initialise. The order matters: expert weights become distributed
tensors before FSDP shards what is left of them, and recomputation wraps what FSDP then gathers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.local_part import local_part
from moetrain.model import MoELayer, Transformer, initial_values
from moetrain.parallel.activity import Activity
from moetrain.parallel.all_to_all_exchange import AllToAllExchange
from moetrain.parallel.mesh import Meshes
from moetrain.parallel.recompute import plain_name, recompute
from moetrain.parallel.sharding import HIDDEN_DIM, shard
from moetrain.settings import ExchangeSettings, ParallelSettings

EXPERT_DIM = 0  # of an expert weight, [experts, hidden, dim]


def parallelize(
    model: Transformer,
    meshes: Meshes,
    settings: ParallelSettings,
    *,
    seed: int | None,
    device: torch.device,
    compute_dtype: torch.dtype,
    activity: Activity | None = None,
) -> Transformer:
    """Returns the model, built on the meta device, sharded over the meshes and initialised.

    Without a seed its weights are left to be filled, from a checkpoint or by `initialise`.
    Weights are float32, and gathered as `compute_dtype`; the router is gathered as float32.
    Gradients are sums over all ranks: the caller divides the loss by the global token count.
    `activity` receives which layer computes, and what its exchange waits for.
    """
    activity = activity or Activity()
    for layer, moe in enumerate(model.moe_layers(), start=model.settings.num_dense_layers):
        spread_experts(moe, meshes, settings.exchange, layer=layer, activity=activity)
    if settings.recompute == "full":
        for index, block in enumerate(model.layers):
            model.layers[index] = recompute(block)
    for number, block in enumerate(model.layers):
        tell_of_layer(block, number, activity)
    shard(model, meshes, compute_dtype=compute_dtype)
    model.to_empty(device=device)
    if seed is not None:
        initialise(model, seed=seed, device=device)
    return model


def spread_experts(
    moe: MoELayer, meshes: Meshes, settings: ExchangeSettings, *, layer: int, activity: Activity
) -> None:
    """Gives each rank of the expert axis its experts, and the layer an exchange to reach all."""
    if (axis := meshes.expert_axis) is None:
        return
    for name, weight in list(moe.experts.named_parameters()):
        spread = distribute_tensor(weight.data, axis, [Shard(EXPERT_DIM)])
        setattr(moe.experts, name, nn.Parameter(spread, requires_grad=weight.requires_grad))
    moe.exchange = AllToAllExchange(
        num_experts=moe.router.num_experts,
        group=axis.get_group(),
        layer=layer,
        settings=settings,
        activity=activity,
    )


def tell_of_layer(block: nn.Module, number: int, activity: Activity) -> None:
    """Makes a block report when its forward and its backward pass begin."""

    def forward(*_: Any) -> None:
        activity.layer(number)

    def returned(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda _: activity.layer(number))

    block.register_forward_pre_hook(forward)
    block.register_forward_hook(returned)


@torch.no_grad()
def initialise(model: Transformer, *, seed: int, device: torch.device) -> None:
    """Fills this rank's shards with their part of the layout-independent initial weights."""
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        if parameter.ndim == 3:
            fill_experts(name, parameter, model=model, seed=seed, device=device)
            continue
        full = initial_values(
            name, tuple(parameter.shape), settings=model.settings, seed=seed, device=device
        )
        shape, offset = _local_block(parameter)
        block = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        local_part(parameter).copy_(full[block])
    for buffer in model.buffers():
        buffer.zero_()


def fill_experts(
    name: str, parameter: Tensor, *, model: Transformer, seed: int, device: torch.device
) -> None:
    """Fills the shards of a stacked expert weight, computing only this rank's experts."""
    shape, offset = _local_block(parameter)
    local = local_part(parameter)
    for index in range(shape[EXPERT_DIM]):
        full = initial_values(
            name,
            tuple(parameter.shape[1:]),
            settings=model.settings,
            seed=seed,
            device=device,
            expert=offset[EXPERT_DIM] + index,
        )
        local[index].copy_(full[offset[HIDDEN_DIM] : offset[HIDDEN_DIM] + shape[HIDDEN_DIM]])


def _local_block(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns shape and global offset of the block of a parameter that this rank holds."""
    if not isinstance(parameter, DTensor):
        return tuple(parameter.shape), (0,) * parameter.ndim
    return compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
