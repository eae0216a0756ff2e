"""Which part of the model a parameter belongs to, by its name."""

import re
from enum import StrEnum

from moetrain.settings.model import ModelSettings


class Role(StrEnum):
    """A part of the model whose parameters are trained and reported together."""

    embedding = "embedding"
    """The token embedding; also the head, where it is tied."""
    attention = "attention"
    """Projections of attention, with their biases."""
    norm = "norm"
    """All norms, those of queries and keys included."""
    router = "router"
    experts = "experts"
    """The routed experts."""
    shared_experts = "shared_experts"
    dense = "dense"
    """Feed-forward layers without a router."""
    head = "head"


_PATTERNS = (
    (Role.norm, r"(.*[._])?norm\."),
    (Role.embedding, r"embedding\."),
    (Role.head, r"head\."),
    (Role.attention, r"layers\.\d+\.attention\."),
    (Role.router, r"layers\.\d+\.feed_forward\.router\."),
    (Role.experts, r"layers\.\d+\.feed_forward\.experts\."),
    (Role.shared_experts, r"layers\.\d+\.feed_forward\.shared_\w+\."),
    (Role.dense, r"layers\.\d+\.feed_forward\."),
)


def role_of(name: str) -> Role:
    """Returns the role of a parameter of `Transformer`, from its name; the first pattern decides.

    Raises ValueError for a name that belongs to no part.
    """
    for role, pattern in _PATTERNS:
        if re.match(pattern, name):
            return role
    raise ValueError(f"{name} belongs to none of {', '.join(Role)}")


def roles_of(settings: ModelSettings) -> set[Role]:
    """Returns the roles that a model has parameters of."""
    found = {Role.embedding, Role.attention, Role.norm}
    if not settings.tie_embeddings:
        found.add(Role.head)
    if settings.num_moe_layers:
        found |= {Role.router, Role.experts}
        if settings.num_shared_experts:
            found.add(Role.shared_experts)
    if settings.num_moe_layers < settings.num_layers:
        found.add(Role.dense)
    return found
