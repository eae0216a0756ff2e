"""The dropless mixture-of-experts layer: route, then exchange tokens with the experts."""

from functools import partial

from jaxtyping import Bool, Float
from torch import Tensor, nn

from moetrain.kernels import expert_function
from moetrain.model.choice import Choice
from moetrain.model.experts import Experts, FeedForward
from moetrain.model.router import RoutingStatistics, build_router
from moetrain.model.token_exchange import LocalExchange, TokenExchange
from moetrain.settings.model import ModelSettings


class MoELayer(nn.Module):
    """Mixtral's feed-forward layer; `exchange` decides where the experts live.

    Shared experts (arXiv 2401.06066) are dense: every token goes through them, on its own rank.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.router = build_router(settings)
        self.experts = Experts(settings)
        self.shared_experts = (
            FeedForward(
                settings.dim,
                settings.num_shared_experts * settings.ffn_hidden_dim,
                function=expert_function(settings.experts),
            )
            if settings.num_shared_experts
            else None
        )
        self.exchange: TokenExchange = LocalExchange(num_experts=settings.num_experts)

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        valid: Bool[Tensor, "*sequences seq"],
        choice: Choice | None = None,
    ) -> tuple[Float[Tensor, "tokens dim"], RoutingStatistics]:
        """Returns the layer's output, and the statistics for its balance losses.

        `valid` has a sequence's tokens in its last dimension; flattened, it has one value per row
        of x. `choice` is the router's, and is passed with the batch.
        """
        choice = choice or Choice(0)
        routing = self.router(x, valid, choice)
        y = self.experts(
            x,
            routing.experts,
            routing.gates,
            exchange=self.exchange,
            memo=choice.memo,
            beside=None if self.shared_experts is None else partial(self.shared_experts, x),
        )
        return y, routing.statistics
