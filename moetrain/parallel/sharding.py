"""FSDP: which modules are gathered and reduced together, when, and over which ranks."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moetrain.model import MoELayer, Transformer
from moetrain.parallel.mesh import Meshes
from moetrain.settings import ParallelSettings

HIDDEN_DIM = 1  # of an expert weight, [experts, hidden, dim]


def shard(model: Transformer, meshes: Meshes, *, compute_dtype: torch.dtype) -> None:
    """Shards experts over the expert-shard axis, and everything else over all sharding ranks."""
    # FSDP doesn't cast inputs: activations get the embedding's dtype, and the rotary table must
    # stay float32.
    policy, exact = (
        MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for dtype in (compute_dtype, torch.float32)
    )
    for block in model.layers:
        for moe in block.modules():
            if not isinstance(moe, MoELayer):
                continue
            fully_shard(
                moe.experts,
                mesh=meshes.of_experts,
                mp_policy=policy,
                # Along the hidden dimension: a rank has the same rows of each of its experts.
                shard_placement_fn=lambda _: Shard(HIDDEN_DIM),
            )
            if compute_dtype != torch.float32:
                fully_shard(moe.router, mesh=meshes.dense, mp_policy=exact)
        fully_shard(block, mesh=meshes.dense, mp_policy=policy)
    fully_shard(model, mesh=meshes.dense, mp_policy=policy)
    for module in _sharded(model):
        # Sums, not means: after the exchange an expert's gradient already covers the tokens of
        # the whole expert axis, and a mean over the remaining axes would scale it differently.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if meshes.topology.data_shard > 1:
        _prefetch(model)


def _prefetch(model: Transformer) -> None:
    """Makes each block gather the next one's weights before it computes.

    FSDP's own prefetch needs a host that runs ahead of the device: it gathers a module's weights
    when the host gets there. But each MoE layer holds the host until its counts are there.
    """
    assert isinstance(model, FSDPModule)
    groups = [list(_sharded(block)) for block in model.layers]  # a block, its router, its experts
    model.set_modules_to_forward_prefetch(groups[0])
    for group, following in pairwise(groups):
        group[0].set_modules_to_forward_prefetch(following)
        following[0].set_modules_to_backward_prefetch(group)


def begin_micro_batch(model: nn.Module, settings: ParallelSettings, last: bool) -> None:
    """Says what the next forward and backward pass leaves to a later micro-batch of the step.

    What is gathered or reduced once a step is so in the `last` one. Until then gradients stay on
    each rank, unsharded and in float32; so do the gathered weights, from the first pass on.
    """
    gather_once = settings.gather_weights == "step"
    reduce_once = settings.reduce_gradients == "step"
    assert isinstance(model, FSDPModule)
    root: FSDPModule = model
    for module in _sharded(model):
        module.set_requires_gradient_sync(last or not reduce_once, recurse=False)
        module.set_reshard_after_backward(last or not gather_once, recurse=False)
        if module is not root:  # the root's weights stay anyway: backward begins with them
            module.set_reshard_after_forward(not gather_once, recurse=False)
    root.set_is_last_backward(last)


def reshard(model: nn.Module) -> None:
    """Frees gathered weights, so that the model's parameters are this rank's shards again."""
    for module in _sharded(model):
        module.reshard()


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
