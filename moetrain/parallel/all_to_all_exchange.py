"""The expert-parallel token exchange: each copy travels to the rank of its expert and back."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from moetrain.kernels import combine_copies, gather_copies, invert, permute, sort_by_expert
from moetrain.model import Received, Routing, TokenExchange

log = logging.getLogger(__name__)

IMBALANCE_TO_WARN_OF = 3.0  # rows received over rows sent


class _AllToAll(torch.autograd.Function):
    """Sends `send[i]` rows to rank i and gets `receive[i]` rows from it; the backward undoes it.

    Gradients of rows come back summed over nobody: each row has one sender. An expert's weight
    gradient therefore already holds the tokens of all ranks in the group.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Any, name: str
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.name = send, receive, group, name
        return _exchange_rows(x, send, receive, group, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        name = f"{ctx.name} (backward)"
        back = _exchange_rows(grad, ctx.receive, ctx.send, ctx.group, name)
        return back, None, None, None, None


def _exchange_rows(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, name: str
) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    try:
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    except RuntimeError as error:
        raise type(error)(
            f"{name} on rank {dist.get_rank()} failed, sending {send} and receiving {receive} "
            f"rows: {error}"
        ) from error
    return out


@dataclass(frozen=True, kw_only=True)
class _Dispatched(Received):
    send: list[int]
    """Rows that went from here to each rank."""
    receive: list[int]
    """Rows that came from each rank."""
    arrival: Tensor
    """The rows that came, in order of local expert, [rows] int64."""


class AllToAllExchange(TokenExchange):
    """Dropless exchange over the ranks of `group`, which hold the experts in order of rank.

    One host synchronisation a layer: reading how many rows go where. A rank without a token,
    or whose experts get none, still enters every collective.
    """

    def __init__(self, *, num_experts: int, group: dist.ProcessGroup, layer: int) -> None:
        self.num_experts = num_experts
        self.group = group
        self.degree = dist.get_world_size(group)
        self._worst = IMBALANCE_TO_WARN_OF
        self.name = f"token all-to-all of layer {layer}"

    def dispatch(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Received:
        """Sends this rank's copies away and returns those that came for its experts."""
        order, counts = sort_by_expert(routing.experts, num_experts=self.num_experts)
        rows = gather_copies(x, order, top_k=routing.experts.shape[1])

        coming = torch.empty_like(counts)  # [degree * local_experts], by source rank
        dist.all_to_all_single(coming, counts, group=self.group)
        by_source = coming.view(self.degree, -1)
        both = torch.stack((counts.view(self.degree, -1).sum(1), by_source.sum(1)))
        send, receive = both.tolist()  # the one host synchronisation
        rows = self._send(rows, send, receive)
        self._warn_of_imbalance(sum(receive), sum(send))

        # What came lies by source rank, then by local expert; the experts want it by expert.
        local_experts = by_source.shape[1]
        expert_of_run = torch.arange(local_experts, device=x.device).repeat(self.degree)
        expert_of_row = torch.repeat_interleave(expert_of_run, coming, output_size=sum(receive))
        arrival = torch.argsort(expert_of_row, stable=True)
        return _Dispatched(
            rows=permute(rows, arrival),
            counts=by_source.sum(0),
            gates=routing.gates,
            order=order,
            send=send,
            receive=receive,
            arrival=arrival,
        )

    def combine(
        self, rows: Float[Tensor, "rows dim"], received: Received
    ) -> Float[Tensor, "tokens dim"]:
        """Sends the results back to their tokens' ranks and sums them with the gates there."""
        assert isinstance(received, _Dispatched)
        rows = permute(rows, invert(received.arrival))
        rows = self._send(rows, received.receive, received.send)
        return combine_copies(rows, received.gates, received.order)

    def _warn_of_imbalance(self, received: int, fair_share: int) -> None:
        if received > self._worst * max(1, fair_share):
            self._worst = 1.2 * received / max(1, fair_share)  # the next warning tells more
            log.warning(
                "%s: rank %d receives %d rows, where a fair share is about %d",
                self.name,
                dist.get_rank(),
                received,
                fair_share,
            )

    def _send(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return _AllToAll.apply(rows, send, receive, self.group, self.name)  # type: ignore[no-any-return, no-untyped-call]
