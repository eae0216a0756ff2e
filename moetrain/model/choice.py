"""A layer's choice of experts in one forward pass: what it is made by, and what it was."""

from collections.abc import Callable, Sequence

from torch import Tensor

Rule = Callable[[Tensor], Tensor]
"""A router's own: selection scores [tokens, experts] → chosen experts [tokens, top_k]."""
Choose = Callable[[int, Tensor, Rule], Tensor]
"""Chooses in a router's place: (number of the layer, scores, its rule) → chosen experts."""


class Choice:
    """Travels with a batch into one layer, and remembers what was chosen there.

    A backward pass that recomputes the layer hands in the same object, and gets the choice that
    was made. A token whose best experts nearly tie could fall the other way the second time:
    counts would shift by one, and the exchange would no longer match what the first pass sent.
    """

    def __init__(
        self,
        layer: int,
        *,
        noise_seeds: Sequence[int] | None = None,
        choose: Choose | None = None,
    ) -> None:
        self.layer = layer
        """Its number in the model."""
        self.noise_seeds = noise_seeds
        """One for each sequence, to draw the router's jitter from; None: no jitter."""
        self._choose = choose
        self._experts: Tensor | None = None

    def experts(self, scores: Tensor, rule: Rule) -> Tensor:
        """Returns the experts that are chosen by the scores, the first time; then the same."""
        if self._experts is None:
            choose = self._choose
            self._experts = rule(scores) if choose is None else choose(self.layer, scores, rule)
        return self._experts
