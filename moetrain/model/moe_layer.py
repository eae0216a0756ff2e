"""The dropless mixture-of-experts layer: route, dispatch, experts, combine."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from moetrain.model.experts import Experts
from moetrain.model.router import Router, RoutingStatistics
from moetrain.model.settings import ModelSettings
from moetrain.model.token_exchange import LocalExchange, TokenExchange


class MoELayer(nn.Module):
    """Mixtral's feed-forward layer; `exchange` decides where the experts live."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.router = Router(settings)
        self.experts = Experts(settings)
        self.exchange: TokenExchange = LocalExchange(num_experts=settings.num_experts)

    def forward(
        self, x: Float[Tensor, "tokens dim"], valid: Bool[Tensor, " tokens"]
    ) -> tuple[Float[Tensor, "tokens dim"], RoutingStatistics]:
        """Returns the layer's output, and what its balance losses are made of."""
        routing = self.router(x, valid)
        received = self.exchange.dispatch(x, routing)  # rows grouped by local expert
        y = self.experts(received.rows, received.counts)
        return self.exchange.combine(y, received), routing.statistics
