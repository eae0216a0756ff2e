"""How queries reach the keys and values that they attend to: the interface, and its version for
one rank."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention: (queries [batch, heads, seq, head_dim], keys and values [batch, kv_heads, seq,
head_dim]) → [batch, heads, seq, head_dim]."""


class KeyValueExchange(ABC):
    """Lets a sequence's queries attend to all earlier keys and values, wherever those are."""

    @abstractmethod
    def run(
        self,
        q: Float[Tensor, "batch heads seq head_dim"],
        k: Float[Tensor, "batch kv_heads seq head_dim"],
        v: Float[Tensor, "batch kv_heads seq head_dim"],
        *,
        attend: Attend,
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """Returns the attention output of the local queries."""


class LocalKeyValues(KeyValueExchange):
    """For whole sequences on one rank: there is nothing to exchange."""

    def run(
        self,
        q: Float[Tensor, "batch heads seq head_dim"],
        k: Float[Tensor, "batch kv_heads seq head_dim"],
        v: Float[Tensor, "batch kv_heads seq head_dim"],
        *,
        attend: Attend,
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """Attends."""
        return attend(q, k, v)
