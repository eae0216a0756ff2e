"""Activation recomputation: a block keeps its input alone, and its `Choice` the experts."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)


def plain_name(name: str) -> str:
    """Returns a parameter's name as it is without the wrapper that recomputation puts in."""
    return name.replace("_checkpoint_wrapped_module.", "")


def recompute(block: nn.Module) -> nn.Module:
    """Returns the block so wrapped that its backward pass computes it again from its input."""
    return checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT)
