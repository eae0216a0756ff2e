"""Initial weights: a pure function of (seed, parameter name, global expert id).

Nothing here depends on ranks, so every layout starts from the same numbers, and a rank can compute
its own part without the rest.
"""

import hashlib
import math

import torch
from torch import Tensor

from moetrain.model.roles import Role, role_of
from moetrain.settings.model import ModelSettings

_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight", "experts.down")


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

    `model.init` says how matrices are drawn. By default they are normal, truncated at three
    standard deviations, with a standard deviation of 1/sqrt(dim); those that write into the
    residual stream are scaled down by sqrt(2 · layers) (GPT-2, section 2.3). Norms start at one,
    biases at zero.
    """
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0, device=device)
    init, std = settings.init, standard_deviation(name, settings)
    generator = torch.Generator(device=device).manual_seed(random_stream(seed, name, expert))
    values = torch.empty(shape, device=device)
    if init.truncate_at is None:
        return torch.nn.init.normal_(values, std=std, generator=generator)
    end = init.truncate_at * std
    return torch.nn.init.trunc_normal_(values, std=std, a=-end, b=end, generator=generator)


def standard_deviation(name: str, settings: ModelSettings) -> float:
    """Returns the standard deviation of a matrix's normal, before it is truncated."""
    init = settings.init
    own = {
        Role.embedding: init.embedding_std,
        Role.head: init.head_std,
        Role.router: init.router_std,
    }.get(role_of(name))
    std = own or init.std or settings.dim**-0.5
    if init.residual_scale == "none" or not name.endswith(_INTO_RESIDUAL):
        return std
    # Two of them in each layer add up: over all layers, or over those so far.
    added = settings.num_layers if init.residual_scale == "depth" else int(name.split(".")[1]) + 1
    return std / math.sqrt(2 * added)


def random_stream(seed: int, *names: str | int | None) -> int:
    """Returns the seed of a random stream; streams of different names are independent."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # generators take 63 bits
