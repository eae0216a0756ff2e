"""Initial weights: a pure function of (seed, parameter name, global expert id).

Nothing here depends on ranks, so every layout starts from the same numbers, and a rank can compute
its own part without the rest.
"""

import hashlib
import math

import torch
from torch import Tensor

from moetrain.settings.model import ModelSettings


def initial_values(
    name: str,
    shape: tuple[int, ...],
    *,
    settings: ModelSettings,
    seed: int,
    device: torch.device,
    expert: int | None = None,
) -> Tensor:
    """Returns the float32 values of a parameter, or of one expert's matrix in a stacked one.

    Matrices are normal, truncated at three standard deviations, with a standard deviation of
    1/sqrt(dim), so that activations keep their scale at any width; those that write into the
    residual stream are scaled down by sqrt(2 · layers) (GPT-2, section 2.3). Norms start at one,
    biases at zero.
    """
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0, device=device)
    std = settings.dim**-0.5
    if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down")):
        std /= math.sqrt(2 * settings.num_layers)
    generator = torch.Generator(device=device).manual_seed(random_stream(seed, name, expert))
    values = torch.empty(shape, device=device)
    return torch.nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)


def random_stream(seed: int, *names: str | int | None) -> int:
    """Returns the seed of a random stream; streams of different names are independent."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # generators take 63 bits
