"""Activation recomputation: a block keeps only its input, and its `Choice` the chosen experts."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)


def plain_name(name: str) -> str:
    """Returns a parameter's name without the wrapper that recomputation adds."""
    return name.replace("_checkpoint_wrapped_module.", "")


def recompute(block: nn.Module) -> nn.Module:
    """Returns the block wrapped so that the backward pass recomputes it from its input."""
    return checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT)
