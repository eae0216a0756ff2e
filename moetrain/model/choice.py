"""A layer's choice of experts in one forward pass: how it is made, and its result."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Rule = Callable[[Tensor], Tensor]
"""A router's rule: selection scores [tokens, experts] → chosen experts [tokens, top_k]."""
Choose = Callable[[int, Tensor, Rule], Tensor]
"""Chooses in a router's place: (number of the layer, scores, its rule) → chosen experts."""


Memo = dict[str, Any]
"""What a layer's first forward pass has found out, for its recomputation."""


class Choice:
    """Is passed with a batch into one layer, and remembers which experts were chosen there.

    A backward pass that recomputes the layer passes the same object, and gets the same choice.
    Otherwise, a token with near-tied experts could be routed differently the second time: counts
    would shift by one, and the exchange would no longer match what the first pass sent.
    """

    def __init__(
        self,
        layer: int,
        *,
        noise_seeds: Sequence[int] | None = None,
        choose: Choose | None = None,
    ) -> None:
        self.layer = layer
        """The layer's number in the model."""
        self.noise_seeds = noise_seeds
        """A seed of the router's jitter for each sequence; None: no jitter."""
        self.memo: Memo = {}
        """The layer's exchange keeps what it learned on the host, which a recomputation reuses."""
        self._choose = choose
        self._experts: Tensor | None = None

    def experts(self, scores: Tensor, rule: Rule) -> Tensor:
        """Returns the experts chosen by the scores on the first call; afterwards, the same ones."""
        if self._experts is None:
            choose = self._choose
            self._experts = rule(scores) if choose is None else choose(self.layer, scores, rule)
        return self._experts
