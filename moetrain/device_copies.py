"""Copies from the host to the device of training."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the host on a device.

    To a GPU it is copied from pinned memory, so that the host doesn't wait: from other memory,
    the driver copies it twice and holds the host until the stream gets there.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
