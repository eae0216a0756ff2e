"""A rank's part of a distributed tensor, for whoever computes element by element."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor: all of it, where it isn't distributed."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
