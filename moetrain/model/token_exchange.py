"""What carries tokens to their experts and back: the contract, and the way without ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float, Int64
from torch import Tensor

from moetrain.kernels import Copies, group_copies

Compute = Callable[[Tensor, Tensor, Copies], Tensor]
"""The local experts: (rows [rows, dim], gates [copies], copies by local expert) → [rows, dim]."""


class TokenExchange(ABC):
    """Brings every token to its experts, has them compute, and brings the results back."""

    @abstractmethod
    def run(
        self,
        x: Float[Tensor, "tokens dim"],
        experts: Int64[Tensor, "tokens top_k"],
        gates: Float[Tensor, "tokens top_k"],
        *,
        compute: Compute,
        beside: Callable[[], Tensor] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Returns for each token the sum of its experts' results, weighted by its gates.

        `compute` works on the rows whose experts live here. Nothing is dropped. What `beside`
        returns is added; it is called while the tokens travel.
        """


class LocalExchange(TokenExchange):
    """All experts live here: grouping by expert is all there is to do."""

    def __init__(self, *, num_experts: int) -> None:
        self.num_experts = num_experts

    def run(
        self,
        x: Float[Tensor, "tokens dim"],
        experts: Int64[Tensor, "tokens top_k"],
        gates: Float[Tensor, "tokens top_k"],
        *,
        compute: Compute,
        beside: Callable[[], Tensor] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Groups the tokens by expert and computes."""
        copies = group_copies(experts, num_groups=self.num_experts)
        y = compute(x, gates.flatten().index_select(0, copies.slot), copies)
        return y if beside is None else y + beside()
