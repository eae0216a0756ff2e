"""Observes each router's choice, and resolves near-ties as in the reference."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moetrain.train.micro_batch import MicroBatch
from moetrain.verify.records import load, routing_file


class RoutingWatch:
    """Observes the choices of one rank, and takes the reference's where rounding alone decides.

    Two experts whose scores are equal up to rounding may be chosen differently in two layouts.
    Neither choice is wrong, but the gradients then differ by that token's part. So where a layout's
    scores equal the reference's up to rounding, and its router would choose as the reference did
    from the reference's scores, the reference's choice is taken and counted; otherwise the choice
    stays, and shows as a difference.
    """

    def __init__(
        self, *, seq_len: int, against: Path | None, records: Path | None, tolerance: float
    ) -> None:
        self.near_ties = 0
        self.chosen_again: set[int] = set()
        """Layers whose backward pass chose experts, which recomputation must never do."""
        self._seq_len, self._tolerance = seq_len, tolerance
        self._against, self._records = against, records
        self._theirs: dict[int, tuple[Tensor, Tensor]] = {}  # scores and choices, by layer
        self._seen: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # by layer and first token
        self._step, self._allowed, self._phase = 0, tolerance, ""

    def begin(
        self, step: int, batches: list[MicroBatch], *, first_sequence: int, grows: bool = True
    ) -> list[MicroBatch]:
        """Returns a step's micro-batches, observed; `first_sequence` is the index in the global
        batch of the first one's first sequence. `grows`: each step begins from weights that are
        further apart."""
        self._step, self._seen = step, {}
        self._allowed = self._tolerance * (step + 1 if grows else 1)
        self._theirs = {} if self._against is None else load(self._against, routing_file(step))
        token, watched = first_sequence * self._seq_len, []
        for batch in batches:
            watched.append(replace(batch, choose=partial(self._choose, token)))
            token += batch.tokens.numel()
        return watched

    def enter(self, phase: str) -> None:
        """Is told each phase of the step."""
        self._phase = phase

    def end(self) -> None:
        """Writes the choices to a file, if others compare with them."""
        if self._records is None:
            return
        whole = {}
        for layer, parts in self._seen.items():
            pieces = [parts[token] for token in sorted(parts)]
            whole[layer] = tuple(torch.cat(part) for part in zip(*pieces, strict=True))
        torch.save(whole, self._records / routing_file(self._step))

    def _choose(
        self, first_token: int, layer: int, scores: Tensor, rule: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Returns what tokens choose by scores [tokens, experts]; the first has its place in the
        global batch."""
        if self._phase == "backward":
            self.chosen_again.add(layer)
        chosen = rule(scores)
        used = scores.detach().clone()
        if self._against is not None:
            chosen, used = self._as_there(first_token, layer, used, chosen, rule)
        self._seen.setdefault(layer, {})[first_token] = used, chosen.clone()
        return chosen

    def _as_there(
        self,
        first_token: int,
        layer: int,
        scores: Tensor,
        chosen: Tensor,
        rule: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Returns the choices, and the scores that they follow from: what others compare with."""
        rows = slice(first_token, first_token + len(scores))
        their_scores, theirs = (t[rows] for t in self._theirs[layer])
        differs = (chosen.sort(-1).values != theirs.sort(-1).values).any(-1)
        apart = (scores - their_scores).abs().amax(-1)
        # The rule must be the same one: given the reference's scores, it makes its choice.
        again = rule(their_scores)
        alike = (again.sort(-1).values == theirs.sort(-1).values).all(-1)
        near = differs & alike & (apart <= self._allowed * their_scores.abs().amax(-1))
        self.near_ties += int(near.sum())
        near = near.unsqueeze(-1)
        return torch.where(near, theirs, chosen), torch.where(near, their_scores, scores)
