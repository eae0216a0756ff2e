"""A gradient that must be there, and a tensor that must be sharded."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def grad_of(tensor: Tensor) -> Tensor:
    """Returns the tensor's gradient; without one, a comparison of None with None would pass."""
    assert tensor.grad is not None, f"no gradient has reached the tensor {list(tensor.shape)}"
    return tensor.grad


def sharded(tensor: Tensor | None) -> DTensor:
    """Returns a parameter or a gradient that FSDP holds, as the DTensor that it must be."""
    assert isinstance(tensor, DTensor), f"{type(tensor).__name__} is no DTensor"
    return tensor
