"""Mixtral's decoder (arXiv 2401.04088): embedding, blocks, final norm, head."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from moetrain.kernels import expert_function
from moetrain.model.attention import Attention
from moetrain.model.choice import Choice, Choose
from moetrain.model.documents import Documents
from moetrain.model.experts import FeedForward
from moetrain.model.init import random_stream
from moetrain.model.losses import chunked_losses, soft_capped
from moetrain.model.moe_layer import MoELayer
from moetrain.model.rotary import rotary_table
from moetrain.model.router import RoutingStatistics
from moetrain.settings.model import ModelSettings


class LossSums(NamedTuple):
    """One forward pass's part of the losses: sums over its valid tokens."""

    cross_entropy: Tensor
    """Summed -log p(target), [] nats."""
    routing: RoutingStatistics
    """Stacked over the MoE layers: [layers, experts] and [layers]; no layers if dense."""
    with_head_z_loss: Tensor | None = None
    """Cross-entropy and the head's weighted z-loss, []; None without a weight. Then it has the
    gradient of both, and `cross_entropy` has none."""
    head_z_sum: Tensor | None = None
    """Summed squared log-sum-exp of the head's logits, []; None without a weight."""

    by_sequence: Tensor | None = None
    """Cross-entropy summed over each sequence, [batch] float64 nats, without a gradient."""

    @property
    def token_loss(self) -> Tensor:
        """What the head adds to the loss: cross-entropy, and its weighted z-loss."""
        return self.cross_entropy if self.with_head_z_loss is None else self.with_head_z_loss


class Block(nn.Module):
    """One layer: attention and feed-forward, each with a norm before it and a residual."""

    def __init__(self, settings: ModelSettings, *, hidden: int | None) -> None:
        """`hidden` is the hidden dimension of a dense feed-forward layer, None for an MoE layer."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.dim, eps=settings.norm_eps)
        self.attention = Attention(settings)
        self.feed_forward_norm = nn.RMSNorm(settings.dim, eps=settings.norm_eps)
        self.feed_forward: MoELayer | FeedForward = (
            MoELayer(settings)
            if hidden is None
            else FeedForward(settings.dim, hidden, function=expert_function(settings.experts))
        )

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        rotary: tuple[Float[Tensor, "*rows seq rotary_dim"], Float[Tensor, "*rows seq rotary_dim"]],
        valid: Bool[Tensor, "batch seq"],
        documents: Documents | None = None,
        choice: Choice | None = None,
    ) -> tuple[Float[Tensor, "batch seq dim"], RoutingStatistics | None]:
        """Returns the block's output, and its routing statistics if it has a router."""
        x = x + self.attention(self.attention_norm(x), rotary, documents)
        y = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, FeedForward):
            return x + self.feed_forward(y), None
        y, statistics = self.feed_forward(y.flatten(0, 1), valid, choice)
        return x + y.view_as(x), statistics


class Transformer(nn.Module):
    """The decoder, on one device or sharded: it knows no ranks."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings.vocab_size, settings.dim)
        self.layers = nn.ModuleList(
            Block(settings, hidden=settings.dense_hidden_dim(layer))
            for layer in range(settings.num_layers)
        )
        self.norm = nn.RMSNorm(settings.dim, eps=settings.norm_eps)
        if not settings.tie_embeddings:
            self.head = nn.Linear(settings.dim, settings.vocab_size, bias=False)

    def forward(
        self,
        tokens: Int64[Tensor, "batch seq"],
        targets: Int64[Tensor, "batch seq"] | None = None,
        valid: Bool[Tensor, "batch seq"] | None = None,
        noise_seeds: Sequence[int] | None = None,
        documents: Documents | None = None,
        choose: Choose | None = None,
    ) -> LossSums | Float[Tensor, "batch seq vocab"]:
        """Returns the loss sums over the valid targets, or without targets the logits.

        Tokens that are not valid count in no loss and no routing statistic. `noise_seeds` are the
        seeds of the routers' jitter, one per sequence; without them there is none. With
        `documents`, attention stops and positions restart at each. `choose` chooses the experts
        instead of the routers.
        """
        if valid is None:
            valid = torch.ones_like(tokens, dtype=torch.bool)
        rotary = rotary_table(tokens.shape[1], settings=self.settings, device=tokens.device)
        if documents is not None:
            cos, sin = (table[documents.positions].unsqueeze(1) for table in rotary)
            rotary = cos, sin  # [batch, 1, seq, rotary_dim]
        x = self.embedding(tokens)
        statistics = []
        for number, layer in enumerate(self.layers):
            choice = self._choice(number, noise_seeds, choose)
            x, routed = layer(x, rotary, valid, documents, choice)
            if routed is not None:
                statistics.append(routed)
        x = self.norm(x)
        head = self.embedding.weight if self.settings.tie_embeddings else self.head.weight
        if targets is None:
            return soft_capped(F.linear(x, head), self.settings.logit_soft_cap)
        z_weight = self.settings.head_z_loss_weight
        found = chunked_losses(
            x.flatten(0, 1),
            head,
            targets.flatten(),
            valid.flatten(),
            chunk_size=self.settings.loss_chunk,
            soft_cap=self.settings.logit_soft_cap,
            z_weight=z_weight,
        )
        routing = self._stack(statistics, x.device)
        by_sequence = found.by_token.view_as(targets).double().sum(1)
        if not z_weight:
            return LossSums(found.total, routing, by_sequence=by_sequence)
        return LossSums(found.cross_entropy, routing, found.total, found.z, by_sequence)

    def _choice(
        self, layer: int, noise_seeds: Sequence[int] | None, choose: Choose | None
    ) -> Choice:
        seeds, moe_layer = None, layer - self.settings.num_dense_layers
        if noise_seeds is not None and moe_layer >= 0:
            seeds = [random_stream(seed, "jitter", moe_layer) for seed in noise_seeds]
        return Choice(layer, noise_seeds=seeds, choose=choose)

    def moe_layers(self) -> list[MoELayer]:
        """Returns the MoE layers, first to last."""
        return [m for m in self.modules() if isinstance(m, MoELayer)]

    def _stack(self, layers: list[RoutingStatistics], device: torch.device) -> RoutingStatistics:
        if layers:
            return RoutingStatistics(*map(torch.stack, zip(*layers, strict=True)))
        none = torch.zeros(0, device=device)
        counts = torch.zeros(0, self.settings.num_experts, dtype=torch.int64, device=device)
        return RoutingStatistics(counts, counts.float(), none, none, none, none)
