"""The decoder on a single device: it knows no ranks and imports no torch.distributed."""

from moetrain.model.attention import Attention
from moetrain.model.choice import Choice, Choose, Memo
from moetrain.model.cost import (
    active_parameters,
    embedding_parameters,
    head_activations,
    kept_activations,
    total_parameters,
    training_flops_per_token,
)
from moetrain.model.documents import Documents
from moetrain.model.init import initial_values, random_stream
from moetrain.model.key_value_exchange import Attend, KeyValueExchange, LocalKeyValues
from moetrain.model.losses import chunked_cross_entropy, load_balance_loss
from moetrain.model.moe_layer import MoELayer
from moetrain.model.roles import Role, role_of
from moetrain.model.rotary import rotary_dim
from moetrain.model.router import Routing, RoutingStatistics
from moetrain.model.token_exchange import Compute, LocalExchange, TokenExchange
from moetrain.model.transformer import LossSums, Transformer

__all__ = [
    "Attend",
    "Attention",
    "Choice",
    "Choose",
    "Compute",
    "Documents",
    "KeyValueExchange",
    "LocalExchange",
    "LocalKeyValues",
    "LossSums",
    "Memo",
    "MoELayer",
    "Role",
    "Routing",
    "RoutingStatistics",
    "TokenExchange",
    "Transformer",
    "active_parameters",
    "chunked_cross_entropy",
    "embedding_parameters",
    "head_activations",
    "initial_values",
    "kept_activations",
    "load_balance_loss",
    "random_stream",
    "role_of",
    "rotary_dim",
    "total_parameters",
    "training_flops_per_token",
]
