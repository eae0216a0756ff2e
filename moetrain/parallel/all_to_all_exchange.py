"""The expert-parallel token exchange: each token travels to the ranks of its experts and back."""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.kernels import (
    Assignments,
    HostCounts,
    gather_rows,
    group_assignments,
    sum_assignments,
)
from moetrain.model import Compute, Memo, TokenExchange
from moetrain.parallel.activity import Activity
from moetrain.parallel.transfer import Transfer, named
from moetrain.settings import ExchangeSettings

log = logging.getLogger(__name__)

Counts = npt.NDArray[np.int64]
# Its name before torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

IMBALANCE_TO_WARN_OF = 3.0  # assignments received over the fair share


class AllToAllExchange(TokenExchange):
    """Dropless exchange over the ranks of `group`, which hold the experts in order of rank.

    There is one host synchronisation per layer: reading how many rows go where. Every rank reads
    the whole matrix of counts, by expert, so that all ranks agree on sizes and rounds before a
    token is sent, and the experts know their loads. A recomputation counts and reads nothing. A
    rank that has no tokens, or whose experts receive none, still enters every collective.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        group: dist.ProcessGroup,
        layer: int,
        settings: ExchangeSettings | None = None,
        activity: Activity | None = None,
    ) -> None:
        self.activity = activity or Activity()
        self.num_experts = num_experts
        self.group = group
        self.rank = dist.get_rank(group)
        self.degree = dist.get_world_size(group)
        self.local_experts = num_experts // self.degree
        self.settings = settings or ExchangeSettings()
        self.name = f"token all-to-all of layer {layer}"
        self._worst = IMBALANCE_TO_WARN_OF

    def run(
        self,
        x: Float[Tensor, "tokens dim"],
        experts: Int64[Tensor, "tokens top_k"],
        gates: Float[Tensor, "tokens top_k"],
        *,
        compute: Compute,
        memo: Memo | None = None,
        beside: Callable[[], Tensor] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Dispatches the tokens, computes the local experts, and combines the outputs."""
        memo = {} if memo is None else memo
        counting = None if "plan" in memo else _Counting(x, experts, exchange=self)
        once = self._sends_once(experts.shape[1])
        goes_to = self._ranks_of(experts) if once else experts
        # Neither sort nor scatter needs the counts: they run while the all-gather is in flight.
        order = torch.argsort(goes_to.flatten(), stable=True)
        if counting is not None:
            memo["plan"] = self._plan(counting.read())
        plan: _Plan = memo["plan"]
        if plan.once:
            sent, metadata = self._pack_once(experts, gates, goes_to, order, plan)
        else:
            sent, metadata = self._pack_each(experts, gates, None if once else order, plan)
        sizes = [sum(step.send) for step in plan.rounds]
        rows = gather_rows(x, sent).split(sizes)
        legs = list(zip(plan.rounds, rows, metadata.split(sizes), strict=True))

        def depart(step: _Round, rows: Tensor, metadata: Tensor) -> Callable[[], Tensor]:
            travelling = [self._transfer(t, step.send, step.receive) for t in (rows, metadata)]
            return lambda: self._compute(step, compute, *(t.wait() for t in travelling))

        # A recomputed round starts only when its result is needed: the checkpointed function must
        # contain the dispatch, which the backward pass repeats. So the next round's dispatch
        # doesn't overlap with this round's computation.
        def depart_again(*leg: Any) -> Callable[[], Tensor]:
            def there() -> Tensor:
                y: Tensor = checkpoint(
                    lambda *leg: depart(*leg)(),
                    *leg,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                return y

            return there

        begin = depart_again if plan.recomputes else depart
        finish = begin(*legs[0])
        extra = None if beside is None else beside()
        home: list[Transfer] = []
        try:
            for step, following in zip(plan.rounds, [*legs[1:], None], strict=True):
                # The next round's dispatch is in flight while this round computes.
                ready, finish = finish, begin(*following) if following else finish
                home.append(self._transfer(ready(), step.receive, step.send))
        except Exception:
            # Recomputation ends by an exception of torch's, once it has what the backward pass
            # needs: that is in the last round, while results of earlier ones travel. Their buffers
            # must not be freed, and used again, before they have arrived.
            for transfer in home:
                with suppress(RuntimeError):  # of a lost peer, as the exception already is
                    transfer.finish()
            raise
        results = [transfer.wait() for transfer in home]
        y = sum_assignments(torch.cat(results) if len(results) > 1 else results[0], sent)
        return y if extra is None else y + extra

    def _plan(self, table: Counts) -> "_Plan":
        """Returns the plan that follows from the table of counts; all ranks compute it alike."""
        headers = table[:, : len(_HEADER)]
        if (headers != headers[0]).any():
            raise RuntimeError(
                f"{self.name} on rank {dist.get_rank()}: the ranks don't agree on "
                f"({', '.join(_HEADER)}): {headers.tolist()}"
            )
        counts = table[:, len(_HEADER) :]  # of each source rank
        rows, by_expert = counts[:, : self.degree], counts[:, self.degree :]
        by_expert = by_expert.reshape(self.degree, self.degree, self.local_experts)
        assignments = by_expert.sum(2)  # from rank to rank, a token once per expert
        load = assignments.sum(0).tolist()
        fair_share = sum(load) / self.degree
        needed = math.ceil(max(load) / max(1.0, self.settings.max_load * fair_share))
        num_rounds = max(1, needed, self.settings.num_rounds)
        if load[self.rank] == max(load):
            self._warn_of_imbalance(max(load), fair_share, num_rounds)

        # With several rounds, each assignment is sent by itself: the counts don't say how many
        # assignments a round would hold if a token's assignments shared one row.
        once = num_rounds == 1 and self._sends_once(int(headers[0, _HEADER.index("top_k")]))
        matrix = rows if once else assignments
        # An expert's assignments follow the experts' before it: how many of the first n are its.
        ends = by_expert[:, self.rank].cumsum(1)  # [source rank, local expert]
        rounds, received = [], np.zeros_like(ends)
        for index in range(num_rounds):
            start, end = (i * matrix // num_rounds for i in (index, index + 1))
            before, sizes = received, end - start
            received = ends if once else np.minimum(ends, end[:, self.rank, None])
            here = (received - before).sum(0)
            rounds.append(
                _Round(
                    send=sizes[self.rank].tolist(),
                    receive=sizes[:, self.rank].tolist(),
                    experts=np.diff(here, prepend=0).tolist(),
                    once=once,
                )
            )
        return _Plan(rounds=rounds, once=once, recomputes=num_rounds > self.settings.num_rounds)

    def _sends_once(self, top_k: int) -> bool:
        return self.settings.send_once and self.local_experts > 1 and top_k > 1

    def _ranks_of(self, experts: Tensor) -> Tensor:
        """Returns the ranks that a token goes to, [tokens, degree].

        Rank r is in slot r, so a rank with several of a token's experts appears once. A slot
        that isn't used holds `degree`, which `group_assignments` takes for empty.
        """
        nowhere = experts.new_full((len(experts), self.degree), self.degree)
        ranks = experts // self.local_experts
        return nowhere.scatter_(1, ranks, ranks)

    # The packing functions return the rows to send, in order of round and rank, and each row's
    # routing metadata [2 · slots]: the gates, then the local indices of the experts on the
    # receiving rank (`local_experts`: none), as numbers of the gates' dtype. One all-to-all then
    # carries both, and the gates' gradients back.

    def _pack_once(
        self, experts: Tensor, gates: Tensor, goes_to: Tensor, order: Tensor, plan: "_Plan"
    ) -> tuple[Assignments, Tensor]:
        """Returns each token once for each rank that has one of its experts."""
        sent = group_assignments(
            goes_to, num_groups=self.degree, num_assignments=sum(plan.rounds[0].send), order=order
        )
        rank = (sent.slot % self.degree).unsqueeze(1)
        here = experts[sent.row] - rank * self.local_experts  # [sent, top_k]
        elsewhere = (here < 0) | (here >= self.local_experts)
        choices = here.masked_fill(elsewhere, self.local_experts)
        return sent, torch.cat((gather_rows(gates, sent), choices.to(gates.dtype)), 1)

    def _pack_each(
        self, experts: Tensor, gates: Tensor, order: Tensor | None, plan: "_Plan"
    ) -> tuple[Assignments, Tensor]:
        """Returns each token once for each of its experts."""
        by_expert = group_assignments(experts, num_groups=self.num_experts, order=order)
        sent = self._in_order_of_rounds(by_expert, plan)
        choices = (experts.flatten()[sent.slot] % self.local_experts).unsqueeze(1)
        weights = gates.flatten().index_select(0, sent.slot).unsqueeze(1)
        return sent, torch.cat((weights, choices.to(weights.dtype)), 1)

    def _in_order_of_rounds(self, assignments: Assignments, plan: "_Plan") -> Assignments:
        """Returns assignments that are grouped by rank, regrouped by round and then by rank."""
        if len(plan.rounds) == 1:
            return assignments
        # Of the n assignments for a rank, assignment i is in the first round r with
        # (r + 1) · n // rounds > i, as in `_plan`. This is computed on the device: uploading a
        # table from the host would synchronise.
        num_assignments, num_rounds = assignments.row.numel(), len(plan.rounds)
        of_rank = assignments.counts.view(self.degree, -1).sum(1)
        before = of_rank.cumsum(0) - of_rank
        rank = torch.arange(self.degree, device=of_rank.device)
        rank = torch.repeat_interleave(rank, of_rank, output_size=num_assignments)
        index = torch.arange(num_assignments, device=rank.device) - before[rank]
        step = ((index + 1) * num_rounds + of_rank[rank] - 1) // of_rank[rank] - 1
        order = torch.argsort(step, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return assignments._replace(
            row=assignments.row[order],
            slot=assignments.slot[order],
            by_row=place[assignments.by_row],
        )

    def _compute(self, step: "_Round", compute: Compute, rows: Tensor, metadata: Tensor) -> Tensor:
        """Applies the local experts to the rows that arrived."""
        gates, choices = metadata.chunk(2, 1)
        assignments = group_assignments(
            choices.detach().long(),
            num_groups=self.local_experts,
            num_assignments=sum(step.experts) if step.once else None,
            host=HostCounts(step.experts),
        )
        return compute(rows, gates.flatten().index_select(0, assignments.slot), assignments)

    def _transfer(self, x: Tensor, send: list[int], receive: list[int]) -> Transfer:
        return Transfer(x, send, receive, group=self.group, activity=self.activity, name=self.name)

    def _warn_of_imbalance(self, worst: int, fair_share: float, num_rounds: int) -> None:
        if worst > self._worst * max(1.0, fair_share):
            self._worst = 1.2 * worst / max(1.0, fair_share)  # warn again only if it gets worse
            log.warning(
                "%s: rank %d receives %d token–expert assignments, where a fair share is %d; "
                "taken in %d rounds",
                self.name,
                dist.get_rank(),
                worst,
                fair_share,
                num_rounds,
            )


_HEADER = ("dim", "bytes per number", "top_k")


class _Counting:
    """The all-gather of the counts; it starts when the object is made."""

    def __init__(self, x: Tensor, experts: Tensor, *, exchange: AllToAllExchange) -> None:
        degree, ranks = exchange.degree, experts // exchange.local_experts
        header = (x.shape[1], x.element_size(), experts.shape[1])
        once = torch.zeros(len(experts), degree, dtype=torch.int64, device=x.device)
        by_expert = torch.zeros(exchange.num_experts, dtype=torch.int64, device=x.device)
        chosen = experts.flatten()
        mine = torch.cat(
            (
                *(ranks.new_full((1,), number) for number in header),  # on the device: no transfer
                once.scatter_(1, ranks, 1).sum(0),
                by_expert.scatter_add_(0, chosen, torch.ones_like(chosen)),
            )
        )
        self.activity = exchange.activity
        self.name = f"counts of the {exchange.name} on rank {dist.get_rank()}"
        self.table = mine.new_empty(degree * len(mine))
        self.degree = degree
        with named(self.name):
            self.work = _all_gather(self.table, mine, group=exchange.group, async_op=True)

    def read(self) -> Counts:
        """Returns one row of counts for each rank: the layer's one host synchronisation."""
        with named(self.name), self.activity.collective(self.name):
            self.work.wait()
            # On CUDA, `wait` only orders streams; the host blocks here.
            table: Counts = self.table.cpu().numpy().reshape(self.degree, -1)
        return table


class _Round(NamedTuple):
    """One part of the rows."""

    send: list[int]
    """How many go to each rank."""
    receive: list[int]
    """How many come from each rank."""
    experts: list[int]
    """The assignments of each local expert among those that come."""
    once: bool


class _Plan(NamedTuple):
    """This rank's part of the exchange, known before a token is sent."""

    rounds: list[_Round]
    once: bool
    """Whether a token is sent once per rank, or once per expert."""
    recomputes: bool
    """Whether the rounds keep no activations, and are recomputed in the backward pass."""
