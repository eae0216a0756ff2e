"""How far two layouts may differ by rounding alone: from float32, reduction lengths and depth.

The layouts compute the same sums in another order. A float32 sum of n terms whose roundings are
independent is off by about eps · sqrt(n) of its size (N. Higham and T. Mary, "A new approach to
probabilistic rounding error analysis", 2019), and so is a chain of products whose reductions add
up to n. There are three such errors here, all relative, as norms of whole tensors:

- of what the forward pass makes: n is the sum of the reductions on a token's way to its loss;
- of a gradient: the way there and, twice as long, back, and then the sum over all tokens;
- of how far the weights moved: the gradients', and each step's rounding of the weights themselves.

Each is multiplied by `SAFETY`. Step s starts from weights that s steps have moved apart, so that
it may be off by s + 1 times as much.
"""

from dataclasses import dataclass

import torch

from moetrain.settings import ModelSettings

EPS = torch.finfo(torch.float32).eps

# Two of them for two roundings of which neither is exact; two for what norms, softmax and
# cross-entropy cancel: their gradients are differences of larger numbers.
SAFETY = 4.0


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Largest relative differences that rounding explains, at the first step."""

    forward: float
    gradient: float

    def gradients(self, *, size: float, total: float) -> float:
        """Returns what a gradient of norm `size` among all, of norm `total`, may be off by.

        Relative to `size`. What cancels to nothing, as the gradient of a lone position's query,
        is made of roundings of larger numbers; what is exactly zero must be so everywhere.
        """
        return self.gradient + (EPS * total / size if size else 0.0)

    def weights(self, *, steps: int, size: float, moved: float) -> float:
        """Returns what a tensor of norm `size`, moved by `moved` in `steps`, may be off by.

        Relative to `moved`; what didn't move at all may not differ at all.
        """
        rounding = steps * EPS * size  # half an eps a step in either of the two: a bound
        return steps * self.gradient + (rounding / moved if moved else 0.0)


def tolerances(model: ModelSettings, *, seq_len: int, num_tokens: int) -> Tolerances:
    """Returns the tolerances of a model on global batches of so many tokens."""
    heads = model.num_heads * model.head_dim
    attention = model.dim + model.head_dim + seq_len + heads  # projections, scores, sum, output
    # The experts', the shared experts' or a dense layer's, whichever sums most.
    hidden = max(
        model.ffn_hidden_dim * max(1, model.num_shared_experts), model.dense_ffn_hidden_dim or 0
    )
    feed_forward = model.dim + hidden + model.top_k + 1
    router = model.dim + model.num_experts
    norms = 2 * model.dim
    layer = attention + feed_forward + router + norms
    there = model.num_layers * layer + 2 * model.dim + model.vocab_size
    return Tolerances(
        forward=SAFETY * EPS * there**0.5,
        gradient=SAFETY * EPS * (3 * there + num_tokens) ** 0.5,
    )
