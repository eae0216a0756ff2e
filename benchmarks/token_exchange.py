"""The MoE layer at expert degree 2 on gloo: what it sends, and the time beyond sending it.

`python -m benchmarks.token_exchange` runs two ranks of one thread each and prints one JSON object
per line on standard output and a table on standard error. In turn with the layer it times the lower
bound of any layer with that routing: a layer with the same rows for each of its experts and no
exchange, and four bare all-to-alls of the fewest bytes. docs/performance.md describes the method.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.layers import Shape, Weights, balanced_choice, model_settings
from benchmarks.timing import machine, print_record, print_table, spread, time_in_turn
from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain.model import MoELayer
from moetrain.parallel import AllToAllExchange
from moetrain.settings import ExchangeSettings
from moetrain.train.rank import keep_freed_memory
from moetrain.verify.ranks import run_ranks

SHAPES = ("512,1792,8,2,2048", "512,256,64,8,1024", "1024,3584,8,2,1024")
DEGREE = 2
OTHER_WAYS = {
    "send_once=false": ExchangeSettings(send_once=False),
    "num_rounds=2": ExchangeSettings(num_rounds=2),
}
# The collectives that could carry rows; unused ones are counted too, should the layer use them.
COLLECTIVES = (
    "all_to_all_single",
    "all_to_all",
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "broadcast",
    "reduce_scatter_tensor",
    "isend",
    "send",
    "batch_isend_irecv",
)


@dataclass
class Sent:
    """Bytes that one rank sends to the others in one forward and backward pass."""

    rows: int = 0
    """Token rows and their gradients, `dim` columns wide."""
    metadata: int = 0
    """Everything else: counts, gates, positions."""
    collectives: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_exchange")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help="tokens are of each rank")
    parser.add_argument("--routing", nargs="+", choices=("learned", "forced"), default=["learned"])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    for shape in options.shapes or [Shape.parse(text) for text in SHAPES]:
        for routing in options.routing:
            records = measure(shape, routing=routing, rounds=options.rounds)
            for record in records:
                print_record(record)
            show(shape, routing, records)


def measure(shape: Shape, *, routing: str, rounds: int) -> list[dict[str, Any]]:
    """Returns the limit's record and the layer's; a round takes as long as its slower rank."""
    of_ranks = run_ranks(
        _measure_as_rank, (shape, routing, rounds), num_ranks=DEGREE, timeout_seconds=1800
    )
    slower = {
        name: [max(both) for both in zip(*(r["seconds"][name] for r in of_ranks), strict=True)]
        for name in of_ranks[0]["seconds"]
    }
    limit = [a + b for a, b in zip(slower["compute"], slower["all_to_all"], strict=True)]
    parts = {name: spread(slower[name]) for name in ("compute", "all_to_all")}
    sent = {
        key: sum(r[key] for r in of_ranks)
        for key in ("row_bytes", "metadata_bytes", "minimum_bytes")
    }
    case = {
        **{name: getattr(shape, name) for name in shape.__dataclass_fields__},
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "expert_degree": DEGREE,
        "routing": routing,
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
    }
    compute, exchange, layer = (median(slower[n]) for n in ("compute", "all_to_all", "layer"))
    common = {"benchmark": "token_exchange", "case": case, "rounds": rounds}
    return [
        {
            **common,
            "implementation": "limit",
            "seconds": spread(limit),
            "ratio_to_limit": 1.0,
            "seconds_of_parts": parts,
            "row_bytes": sent["minimum_bytes"],
        },
        {
            **common,
            "implementation": "moetrain",
            "seconds": spread(slower["layer"]),
            "ratio_to_limit": median(limit) / layer,
            "overhead_share": (layer - compute - exchange) / (compute + exchange),
            "row_bytes": sent["row_bytes"],
            "row_bytes_over_minimum": sent["row_bytes"] / max(1, sent["minimum_bytes"]),
            "metadata_bytes": sent["metadata_bytes"],
            "collectives": of_ranks[0]["collectives"],
        },
        *(
            {
                **common,
                "implementation": f"moetrain {name}",
                "seconds": spread(slower[name]),
                "ratio_to_limit": median(limit) / median(slower[name]),
            }
            for name in OTHER_WAYS
        ),
    ]


def _measure_as_rank(job: tuple[Shape, str, int], _: object) -> dict[str, Any]:
    shape, routing, rounds = job
    keep_freed_memory()  # as a rank of a run does
    rank, cpu = dist.get_rank(), torch.device("cpu")
    torch.manual_seed(1 + rank)
    x = torch.randn(shape.tokens, shape.dim, requires_grad=True)
    dy = torch.randn(shape.tokens, shape.dim)
    weights = Weights.random(shape, dtype=torch.float32, device=cpu)
    local = slice(rank * shape.experts // DEGREE, (rank + 1) * shape.experts // DEGREE)
    mine = Weights(weights.router, weights.gate[local], weights.up[local], weights.down[local])

    layer = _layer(shape, mine)
    group = dist.group.WORLD
    assert group is not None
    layer.exchange = AllToAllExchange(num_experts=shape.experts, group=group, layer=0)
    if routing == "forced":
        forced = balanced_choice(shape, cpu)
        layer.router.select = lambda scores: forced
    chosen = _spied_choice(layer)
    step = _step(layer, x, dy)
    with counting(shape.dim) as sent:
        step()

    counts = _received_counts(chosen[0], shape)[local]
    tensors = [x, *layer.parameters()]
    passes: dict[str, Callable[[], object]] = {"layer": step}
    for name, settings in OTHER_WAYS.items():
        other = _layer(shape, mine)
        other.exchange = AllToAllExchange(
            num_experts=shape.experts, group=group, layer=0, settings=settings
        )
        other.router.select = layer.router.select
        passes[name] = _step(other, x, dy)
        tensors += other.parameters()
    pairs, incoming = _rows_between(chosen[0], shape)
    without = _layer_without_exchange(shape, mine, counts)
    tokens = int(counts.sum()) // shape.top_k
    x_without = torch.randn(tokens, shape.dim, requires_grad=True)
    passes["compute"] = _step(without, x_without, torch.randn(tokens, shape.dim))
    passes["all_to_all"] = _bare_exchange(pairs, incoming, shape.dim)
    tensors += [x_without, *without.parameters()]

    def together() -> None:
        for tensor in tensors:
            tensor.grad = None
        dist.barrier()

    # The order of a round depends only on its number, so that both ranks have the same.
    seconds = time_in_turn(passes, rounds=rounds, warmup=2, device=cpu, prepare=together)
    # The rows travel there and back, and so do their gradients: what is sent as a token comes back
    # as a gradient, and the results go the other way.
    minimum = 2 * (pairs + incoming) * shape.dim * x.element_size()
    return {
        "seconds": seconds,
        "row_bytes": sent.rows,
        "metadata_bytes": sent.metadata,
        "collectives": sent.collectives,
        "minimum_bytes": minimum,
    }


@torch.no_grad()
def _layer(shape: Shape, mine: Weights) -> MoELayer:
    """Returns a layer that routes over all experts and holds those of `mine`."""
    with torch.device("meta"):
        layer = MoELayer(model_settings(shape))
    layer.router.to_empty(device="cpu")
    layer.router.bias.zero_()
    layer.router.weight.copy_(mine.router)
    for name in ("gate", "up", "down"):
        setattr(layer.experts, name, nn.Parameter(getattr(mine, name).clone()))
    return layer


def _layer_without_exchange(shape: Shape, mine: Weights, counts: Tensor) -> MoELayer:
    """Returns a whole layer of this rank's experts alone, which gives each as many rows as it got.

    Up to top_k - 1 rows fewer, if they don't make up a token.
    """
    alone = replace(shape, experts=len(counts), top_k=min(shape.top_k, len(counts)))
    layer = _layer(alone, mine._replace(router=mine.router[: len(counts)]))
    assignments = torch.arange(len(counts)).repeat_interleave(counts)
    tokens = len(assignments) // shape.top_k
    shuffled = assignments[torch.randperm(len(assignments))[: tokens * shape.top_k]]
    choice = shuffled.view(tokens, shape.top_k)
    layer.router.select = lambda scores: choice
    return layer


def _spied_choice(layer: MoELayer) -> list[Tensor]:
    """Returns a list whose only element is the latest choice of experts, [tokens, top_k]."""
    select = layer.router.select
    seen: list[Tensor] = []

    def spy(scores: Tensor) -> Tensor:
        seen[:] = [select(scores)]
        return seen[0]

    layer.router.select = spy
    return seen


def _step(layer: MoELayer, x: Tensor, dy: Tensor) -> Callable[[], None]:
    valid = torch.ones(len(x), dtype=torch.bool)

    def step() -> None:
        layer(x, valid)[0].backward(dy)

    return step


def _received_counts(chosen: Tensor, shape: Shape) -> Tensor:
    counts = chosen.flatten().bincount(minlength=shape.experts)
    dist.all_reduce(counts)
    return counts


def _rows_between(chosen: Tensor, shape: Shape) -> tuple[int, int]:
    """Returns the fewest rows that must go to the other rank, and that must come from it.

    One for each token that has an expert there, however many it has there.
    """
    homes = chosen // (shape.experts // DEGREE)
    away = int((homes != dist.get_rank()).any(1).sum())
    both = [torch.zeros(1, dtype=torch.int64) for _ in range(DEGREE)]
    dist.all_gather(both, torch.tensor([away]))
    return away, int(both[1 - dist.get_rank()])


def _bare_exchange(away: int, incoming: int, dim: int) -> Callable[[], None]:
    """Returns the four all-to-alls of the fewest rows, into preallocated buffers."""
    rank = dist.get_rank()
    there = [0, away] if rank == 0 else [away, 0]
    back = [0, incoming] if rank == 0 else [incoming, 0]
    rows, results = torch.randn(away, dim), torch.randn(incoming, dim)

    def exchange() -> None:
        for _ in ("forward", "backward"):
            dist.all_to_all_single(results, rows, back, there)
            dist.all_to_all_single(rows, results, there, back)

    return exchange


@contextmanager
def counting(dim: int) -> Iterator[Sent]:
    """Counts what torch.distributed's collectives send to other ranks, within the context."""
    sent, originals = Sent(), {name: getattr(dist, name) for name in COLLECTIVES}

    def counted_all_to_all(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        splits = kwargs.get("input_split_sizes", args[1] if len(args) > 1 else None)
        world, rank = dist.get_world_size(), dist.get_rank()
        splits = splits or [len(input) // world] * world
        others = sum(splits) - splits[rank]
        width = input[0].numel() if len(input) else 0
        # What is sent with a row in additional columns is metadata as well.
        of_rows = dim if input.is_floating_point() and width >= dim else 0
        sent.collectives += 1
        sent.rows += others * of_rows * input.element_size()
        sent.metadata += others * (width - of_rows) * input.element_size()
        return originals["all_to_all_single"](output, input, *args, **kwargs)

    def counted_all_gather(tensor_list: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.collectives += 1
        sent.metadata += (dist.get_world_size() - 1) * tensor.numel() * tensor.element_size()
        return originals["all_gather"](tensor_list, tensor, *args, **kwargs)

    def uncounted(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"the layer called dist.{name}, whose bytes this benchmark can't count yet"
            )

        return refuse

    try:
        for name in COLLECTIVES:
            setattr(dist, name, uncounted(name))
        dist.all_to_all_single = counted_all_to_all
        dist.all_gather = counted_all_gather  # of counts: rows are sent by all-to-all
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def show(shape: Shape, routing: str, records: Sequence[dict[str, Any]]) -> None:
    """Prints a case's table."""
    limit, layer, *others = records
    rows = [
        (name, f"{1e3 * seconds[1]:.1f}", f"{1e3 * seconds[0]:.1f}–{1e3 * seconds[2]:.1f}", mib)
        for name, seconds, mib in (
            ("compute without exchange", limit["seconds_of_parts"]["compute"], ""),
            (
                "bare all-to-alls",
                limit["seconds_of_parts"]["all_to_all"],
                f"{limit['row_bytes'] / 2**20:.2f}",
            ),
            ("layer", layer["seconds"], f"{layer['row_bytes'] / 2**20:.2f}"),
            *((f"layer, {o['implementation'].split()[1]}", o["seconds"], "") for o in others),
        )
    ]
    print_table(
        f"expert degree {DEGREE}, gloo, 1 thread a rank · dim,hidden,experts,top_k,tokens a rank "
        f"{shape} · {routing} routing · rows sent {layer['row_bytes_over_minimum']:.3f} of the "
        f"minimum, metadata {layer['metadata_bytes'] / 2**10:.1f} KiB · time beyond compute and "
        f"all-to-all {layer['overhead_share']:+.1%}",
        ("pass", "ms", "min–max", "MiB of rows"),
        rows,
    )


if __name__ == "__main__":
    ignore_broken_pipes()
    main()
