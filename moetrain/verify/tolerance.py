"""How far two runs may differ by rounding alone: from dtype, reduction lengths and depth.

Layouts compute the same sums in another order. A float32 sum of n terms whose roundings are
independent is off by about eps · sqrt(n) of its size (N. Higham and T. Mary, "A new approach to
probabilistic rounding error analysis", 2019), and so is a chain of products whose reductions add
up to n. There are three such errors here, all relative, as norms of whole tensors:

- of what the forward pass makes: n is the sum of the reductions on a token's way to its loss;
- of a gradient: the way there and, twice as long, back, and then the sum over all tokens;
- of how far the weights moved: the gradients', and each step's rounding of the weights themselves.

In bfloat16, products still add up in float32 and only results are rounded, so that n is the number
of results. Each is multiplied by `SAFETY`. Step s starts from weights that s steps have moved
apart, so that it may be off by s + 1 times as much.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.settings import ModelSettings, OptimSettings

EPS = torch.finfo(torch.float32).eps

# Two of them for two roundings of which neither is exact; two for what norms, softmax and
# cross-entropy cancel: their gradients are differences of larger numbers.
SAFETY = 4.0


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Largest relative differences that rounding explains, at the first step."""

    forward: float
    gradient: float
    norm: float | None = None
    """Of the norm of all gradients; None: that of a gradient."""

    def gradients(self, *, size: float, total: float) -> float:
        """Returns what a gradient of norm `size` among all, of norm `total`, may be off by.

        Relative to `size`. What cancels to nothing, as the gradient of a lone position's query,
        is made of roundings of larger numbers; what is exactly zero must be so everywhere.
        """
        return self.gradient + (EPS * total / size if size else 0.0)

    def weights(self, *, steps: int, size: float, moved: float, decays: bool = False) -> float:
        """Returns what a tensor of norm `size`, moved by `moved` in `steps`, may be off by.

        In absolute terms; what neither moved nor decayed may not differ at all.
        """
        rounding = steps * EPS * size  # half an eps a step in either of the two: a bound
        return steps * self.gradient * moved + (rounding if moved or decays else 0.0)


def tolerances(model: ModelSettings, *, seq_len: int, num_tokens: int) -> Tolerances:
    """Returns the tolerances of a model on global batches of so many tokens, in float32."""
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


# Of one layer, results and weights that are rounded to the compute dtype: two norms (2 · 2 with
# their weights), q, k, v, output and router-free products (4 · 2), rotated q and k (2), attention's
# probabilities and sum (2), gate, up and down (3 · 2), silu and its product (2), the sum over
# experts (1), shared experts (1), two residual sums (2).
ROUNDED_IN_A_LAYER = 28
ROUNDED_AT_THE_ENDS = 6  # embedding; norm and head with their weights; logits' gradient


def rounded_tolerances(model: ModelSettings, dtype: torch.dtype) -> Tolerances:
    """Returns the tolerances of a model whose results are rounded to a dtype.

    One rounding is off by up to half an eps.
    """
    half = torch.finfo(dtype).eps / 2
    there = model.num_layers * ROUNDED_IN_A_LAYER + ROUNDED_AT_THE_ENDS
    return Tolerances(
        forward=SAFETY * half * there**0.5, gradient=SAFETY * half * (3 * there) ** 0.5
    )


def summed_tolerances(model: ModelSettings, *, num_terms: int) -> Tolerances:
    """Returns the tolerances of layouts that add up equal terms in another order, in float32.

    Whatever the compute dtype, micro-batches of equal sequences have equal bits; only their sum
    over ranks or over micro-batches remains, and the norm's sum over a tensor's elements.
    """
    error = SAFETY * EPS * num_terms**0.5
    largest = model.dim * max(model.vocab_size, model.num_experts * model.ffn_hidden_dim)
    return Tolerances(forward=error, gradient=error, norm=SAFETY * EPS * largest**0.5)


@dataclass(frozen=True, kw_only=True)
class AdamErrors:
    """What one AdamW update may be off by, given what its gradients may be off by.

    With m and v the means of gradients g_k and of their squares, weighted with a_k and b_k, let
    each g_k be off by a share t of its size. Then sqrt(v), a weighted Euclidean norm, is off by at
    most t · sqrt(v), and m by t · sum a_k · |g_k|, which by Cauchy and Schwarz is at most
    t · spread · sqrt(v) with spread² = sum a_k² / b_k. So with d = t · sqrt(v), spread over the
    elements of a tensor evenly, the update u = m / (sqrt(v) + eps) of an element is off by at most
    (spread + |u|) · d / (sqrt(v) + eps), and never by more than spread + |u|: that is where a
    gradient is nothing but rounding and its sign is open. An element that never had a gradient has
    no error.
    """

    settings: OptimSettings
    updates: int
    gradient: float
    """The tolerance of a gradient, relative to its norm."""

    def of(self, m: Tensor, v: Tensor, *, lr: float, total: float) -> tuple[float, float, float]:
        """Returns the norms of the errors of the update, of m and of sqrt(v).

        `total` is the norm of sqrt(v) over all parameters.
        """
        (beta1, beta2), root = self.settings.betas, v.double().clamp_min(0).sqrt()
        ages = range(self.updates)
        a = [(1 - beta1) * beta1**age for age in ages]
        b = [max((1 - beta2) * beta2**age, 1e-30) for age in ages]
        spread = sum(x * x / y for x, y in zip(a, b, strict=True)) ** 0.5
        norm = float(root.norm())
        error = self.gradient * norm + EPS * total
        moments = spread * error, error
        if not (elements := int((root > 0).sum())):
            return 0.0, *moments
        corrected1, corrected2 = 1 - beta1**self.updates, (1 - beta2**self.updates) ** 0.5
        scale = root / corrected2 + self.settings.eps
        u = (m.double() / corrected1 / scale).abs()
        each = error / corrected2 / elements**0.5
        largest = spread * corrected2 / corrected1 + u
        off = largest * (each / scale).clamp_max(1.0) + 4 * EPS * u
        return lr * float(off[root > 0].norm()), *moments
