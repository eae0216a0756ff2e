"""What brings queries to the keys and values that they attend to: the contract, and the way
without ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention: (queries [batch, heads, seq, head_dim], keys and values [batch, kv_heads, seq,
head_dim]) → [batch, heads, seq, head_dim]."""


class KeyValueExchange(ABC):
    """Has a sequence's queries meet all keys and values before them, wherever those are."""

    @abstractmethod
    def run(
        self,
        q: Float[Tensor, "batch heads seq head_dim"],
        k: Float[Tensor, "batch kv_heads seq head_dim"],
        v: Float[Tensor, "batch kv_heads seq head_dim"],
        *,
        attend: Attend,
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """Returns what the queries that stand here get."""


class LocalKeyValues(KeyValueExchange):
    """Whole sequences stand here: there is nothing to bring."""

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
