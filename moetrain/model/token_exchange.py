"""Dispatch and combine of tokens and experts: the interface, and its version for one rank."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float, Int64
from torch import Tensor

from moetrain.kernels import Assignments, group_assignments
from moetrain.model.choice import Memo

Compute = Callable[[Tensor, Tensor, Assignments], Tensor]
"""The local experts: (rows [rows, dim], gates [assignments], assignments) → [rows, dim]."""


class TokenExchange(ABC):
    """Dispatches every token to its experts, applies them, and combines their outputs."""

    @abstractmethod
    def run(
        self,
        x: Float[Tensor, "tokens dim"],
        experts: Int64[Tensor, "tokens top_k"],
        gates: Float[Tensor, "tokens top_k"],
        *,
        compute: Compute,
        memo: Memo | None = None,
        beside: Callable[[], Tensor] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Returns for each token the sum of its experts' outputs, weighted by its gates.

        `compute` applies the local experts to their rows. No token is dropped. The result of
        `beside` is added; it is called while the dispatch is in flight. A recomputation passes the
        first pass's `memo`, and then needs no host synchronisation.
        """


class LocalExchange(TokenExchange):
    """For all experts on one rank: it only groups tokens by expert."""

    def __init__(self, *, num_experts: int) -> None:
        self.num_experts = num_experts

    def run(
        self,
        x: Float[Tensor, "tokens dim"],
        experts: Int64[Tensor, "tokens top_k"],
        gates: Float[Tensor, "tokens top_k"],
        *,
        compute: Compute,
        memo: Memo | None = None,
        beside: Callable[[], Tensor] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Groups the tokens by expert and computes."""
        memo = {} if memo is None else memo
        assignments = group_assignments(
            experts, num_groups=self.num_experts, host=memo.get("counts")
        )
        memo["counts"] = assignments.host
        y = compute(x, gates.flatten().index_select(0, assignments.slot), assignments)
        return y if beside is None else y + beside()
