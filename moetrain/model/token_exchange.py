"""What carries tokens to their experts and back: the contract, and the way without ranks."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from moetrain.kernels import combine_copies, gather_copies, sort_by_expert
from moetrain.model.router import Routing


@dataclass(frozen=True, kw_only=True)
class Received:
    """Token copies at the rank that holds their experts."""

    rows: Tensor
    """[rows, dim], grouped by local expert; exactly the copies that came, none padded."""
    counts: Tensor
    """Rows of each local expert, [local_experts] int64."""
    gates: Tensor
    """The gate weights of this rank's own tokens, [tokens, top_k] float32."""
    order: Tensor
    """This rank's own token copies in order of global expert, [tokens * top_k] int64."""


class TokenExchange(ABC):
    """Sends every token copy to its expert and brings the results back to the token."""

    @abstractmethod
    def dispatch(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Received:
        """Returns the copies whose experts live here, grouped by expert. Nothing is dropped."""

    @abstractmethod
    def combine(
        self, rows: Float[Tensor, "rows dim"], received: Received
    ) -> Float[Tensor, "tokens dim"]:
        """Returns for each token the sum of its experts' results, weighted by its gates."""


class LocalExchange(TokenExchange):
    """All experts live here: sorting by expert is all there is to do."""

    def __init__(self, *, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Received:
        """Returns the copies in order of expert."""
        order, counts = sort_by_expert(routing.experts, num_experts=self.num_experts)
        rows = gather_copies(x, order, top_k=routing.experts.shape[1])
        return Received(rows=rows, counts=counts, gates=routing.gates, order=order)

    def combine(
        self, rows: Float[Tensor, "rows dim"], received: Received
    ) -> Float[Tensor, "tokens dim"]:
        """Sums the copies of each token, weighted by its gates."""
        return combine_copies(rows, received.gates, received.order)
