"""Rotary position embedding (arXiv 2104.09864), in the half-rotating form of Mixtral's weights."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotary_table(
    seq_len: int, *, head_dim: int, theta: float, device: torch.device
) -> tuple[Float[Tensor, "seq head_dim"], Float[Tensor, "seq head_dim"]]:
    """Returns cosine and sine for positions 0 … seq_len - 1, in float32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponent
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"],
    cos: Float[Tensor, "*rows seq head_dim"],
    sin: Float[Tensor, "*rows seq head_dim"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Rotates queries or keys by their positions; the pairs are (i, i + head_dim / 2).

    Cosine and sine are shared by all sequences, or [batch, 1, seq, head_dim].
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
