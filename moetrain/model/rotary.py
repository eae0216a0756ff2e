"""Rotary position embedding (arXiv 2104.09864), in the half-rotating form of Mixtral's weights."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moetrain.settings.model import ModelSettings, RopeScalingSettings


def rotary_dim(settings: ModelSettings) -> int:
    """Returns how many dimensions of a head are rotated: the first ones."""
    return int(settings.head_dim * settings.partial_rotary_factor)


def rotary_table(
    seq_len: int, *, settings: ModelSettings, device: torch.device
) -> tuple[Float[Tensor, "seq rotary_dim"], Float[Tensor, "seq rotary_dim"]]:
    """Returns cosine and sine for positions 0 … seq_len - 1, in float32."""
    dim, scaling = rotary_dim(settings), settings.rope_scaling
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / settings.rope_theta**exponent
    factor = 1.0
    if scaling.type == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.type == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif scaling.type == "yarn":
        frequencies = _yarn(frequencies, scaling, theta=settings.rope_theta)
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    if factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def _llama3(frequencies: Tensor, scaling: RopeScalingSettings) -> Tensor:
    """Divides low frequencies by the factor, and blends in the middle (arXiv 2407.21783)."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    rotations = _original_length(scaling) / wavelengths
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Tensor, scaling: RopeScalingSettings, *, theta: float) -> Tensor:
    """Blends by a ramp over the dimensions between `beta_fast` and `beta_slow` rotations
    (arXiv 2309.00071, section 3.2), whose ends are rounded outwards as in transformers."""
    dim, length = 2 * len(frequencies), _original_length(scaling)

    def dim_with(rotations: float) -> float:
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dim_with(scaling.beta_fast)), 0)
    last = min(math.ceil(dim_with(scaling.beta_slow)), dim - 1)
    index = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    ramp = ((index - first) / max(last - first, 0.001)).clamp(0, 1)  # 0.001: as in transformers
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _original_length(scaling: RopeScalingSettings) -> int:
    assert scaling.original_max_seq_len is not None, "config.check demands it"
    return scaling.original_max_seq_len


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"],
    cos: Float[Tensor, "*rows seq rotary_dim"],
    sin: Float[Tensor, "*rows seq rotary_dim"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Rotates queries or keys by their positions; the pairs are (i, i + rotary_dim / 2).

    Cosine and sine are shared by all sequences, or [batch, 1, seq, rotary_dim]. What a head has
    beyond them stays.
    """
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = (rotated * cos + turned * sin).to(x.dtype)
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)
