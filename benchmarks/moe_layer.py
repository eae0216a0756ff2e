"""One MoE layer, forward and backward, compared with other libraries' and the limit.

`python -m benchmarks.moe_layer` prints one JSON object per line on standard output and a table on
standard error; `--help` lists the options. docs/performance.md describes the method.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.layers import (
    BUILDERS,
    Layer,
    Limit,
    Shape,
    Weights,
    balanced_choice,
)
from benchmarks.timing import (
    Pass,
    machine,
    peak_memory,
    print_record,
    print_table,
    say,
    spread,
    time_in_turn,
)
from benchmarks.torchtitan_package import Unavailable
from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain.train.rank import keep_freed_memory

PRESETS = {
    "cpu": (
        "512,1792,8,2,4096",
        "256,896,8,2,4096",
        "1024,3584,8,2,2048",
        "512,256,64,8,2048",
        "512,1792,8,2,256",
    ),
    # Mixtral 8x7B and 8x22B, OLMoE-1B-7B, and 8 experts top-2 from dim 512 up.
    "gpu": (
        "4096,14336,8,2,8192",
        "6144,16384,8,2,8192",
        "2048,1024,64,8,16384",
        "512,1792,8,2,16384",
        "1024,3584,8,2,16384",
        "2048,7168,8,2,16384",
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ONEDNN = "limit by oneDNN"
ROUTINGS = ("learned", "forced")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table: a shape, where it runs and how."""

    shape: Shape
    dtype: str
    device: torch.device
    threads: int
    routing: str

    def as_json(self) -> dict[str, Any]:
        """Returns the case as it is printed."""
        place = {"threads": self.threads} if self.device.type == "cpu" else {}
        return {
            **{name: getattr(self.shape, name) for name in self.shape.__dataclass_fields__},
            "dtype": self.dtype,
            "device": self.device.type,
            **place,
            "routing": self.routing,
            "machine": machine(self.device),
            "torch": torch.__version__,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
        if options.keep_freed_memory == "yes":
            keep_freed_memory()
    for shape in options.shapes:
        for routing in options.routing:
            case = Case(
                shape=shape,
                dtype=options.dtype,
                device=device,
                threads=options.threads,
                routing=routing,
            )
            records = measure(
                case,
                implementations=options.implementations,
                seconds=options.seconds,
                rounds=options.rounds,
            )
            for record in records:
                print_record(record)
            show(case, records)
            gc.collect()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_layer", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads on CPU (%(default)s)")
    parser.add_argument(
        "--keep-freed-memory",
        choices=("yes", "no"),
        default="yes",
        help="whether malloc keeps memory for the next pass, as in a run on CPU (%(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="a list of shapes")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=Shape.parse,
        metavar="DIM,HIDDEN,EXPERTS,TOP_K,TOKENS",
        help="shapes of your own, in place of the preset's",
    )
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["learned", "forced"])
    parser.add_argument(
        "--implementations", nargs="+", choices=BUILDERS, default=list(BUILDERS), help="all"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="about how long to time a case (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, help="how many rounds instead, exactly")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or [Shape.parse(text) for text in PRESETS[options.preset]]
    return options


def measure(
    case: Case, *, implementations: Sequence[str], seconds: float, rounds: int | None
) -> list[dict[str, Any]]:
    """Returns one record for each implementation that can run here, the limit's first.

    Rounds continue for about `seconds`, ten to a thousand of them, unless `rounds` is given.
    """
    shape, device, dtype = case.shape, case.device, DTYPES[case.dtype]
    torch.manual_seed(0)
    weights = Weights.random(shape, dtype=dtype, device=device)
    choice = balanced_choice(shape, device) if case.routing == "forced" else None
    x = torch.randn(shape.tokens, shape.dim, device=device).to(dtype).requires_grad_()
    dy = torch.randn(shape.tokens, shape.dim, device=device).to(dtype)

    layers = _build(implementations, shape, weights, choice)
    steps = {layer.name: _step(layer, x, dy) for layer in layers}
    clear = _clearing(layers, x)
    differences, peaks = {}, {}
    reference = _results(layers[0], x, dy)
    for layer in layers:
        clear()
        differences[layer.name] = _difference(_results(layer, x, dy), reference)
        clear()
        peaks[layer.name] = peak_memory(steps[layer.name], device)
    clear()
    load = _load(weights, x, choice, shape)

    passes: dict[str, Pass] = {"limit": Limit(shape, dtype=dtype, device=device), **steps}
    if device.type == "cpu" and dtype == torch.float32:
        # A stricter limit: on some processors oneDNN is faster than torch.mm.
        passes[ONEDNN] = Limit(shape, dtype=dtype, device=device, product=_onednn)
    if rounds is None:
        once = time_in_turn(passes, rounds=1, warmup=1, device=device, prepare=clear)
        rounds = max(10, min(1000, int(seconds / sum(map(sum, once.values())))))
    taken = time_in_turn(passes, rounds=rounds, warmup=2, device=device, prepare=clear)

    limit = median(taken["limit"])
    strict = min(limit, median(taken.get(ONEDNN, [limit])))
    return [
        {
            "benchmark": "moe_layer",
            "case": case.as_json(),
            "implementation": name,
            "seconds": spread(taken[name]),
            "ratio_to_limit": limit / median(taken[name]),
            "ratio_to_fastest_limit": strict / median(taken[name]),
            "rounds": rounds,
            "gflops_per_second": shape.flops / median(taken[name]) / 1e9,
            "peak_memory_bytes": peaks.get(name),
            "max_over_mean_load": load,
            "relative_difference": differences.get(name),
        }
        for name in passes
    ]


def _onednn(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    # It has no form that writes into a given tensor; dropping its own is cheaper than copying it.
    torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _build(
    implementations: Sequence[str], shape: Shape, weights: Weights, choice: Tensor | None
) -> list[Layer]:
    layers = []
    for name in implementations:
        try:
            layers.append(BUILDERS[name](shape, weights, choice))
        except Unavailable as reason:
            say(f"{name} is left out: {reason}")
    return layers


def _step(layer: Layer, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer.forward(x).backward(dy)

    return step


def _clearing(layers: Sequence[Layer], x: Tensor) -> Callable[[], None]:
    """Returns a function that clears all gradients, so that each pass allocates its own."""
    tensors = [x, *(parameter for layer in layers for parameter in layer.parameters)]

    def clear() -> None:
        for tensor in tensors:
            tensor.grad = None

    return clear


def _results(layer: Layer, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    y = layer.forward(x)
    y.backward(dy)
    assert x.grad is not None
    assert layer.router.grad is not None
    return {"output": y.detach(), "x_gradient": x.grad, "router_gradient": layer.router.grad}


def _difference(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Returns how far each result is from the first implementation's, relative to its norm."""
    return {
        key: ((ours[key] - reference[key]).double().norm() / reference[key].double().norm()).item()
        for key in reference
    }


def _load(weights: Weights, x: Tensor, choice: Tensor | None, shape: Shape) -> float:
    """Returns the number of assignments of the busiest expert over the mean."""
    if choice is None:
        logits = x.detach().float() @ weights.router.float().t()
        choice = logits.topk(shape.top_k, dim=-1).indices
    counts = choice.flatten().bincount(minlength=shape.experts)
    return (counts.max() / counts.float().mean()).item()


def show(case: Case, records: Sequence[dict[str, Any]]) -> None:
    """Prints a case's table."""
    load = records[0]["max_over_mean_load"]
    where = case.device.type if case.device.type != "cpu" else f"cpu, {case.threads} threads"
    print_table(
        f"dim,hidden,experts,top_k,tokens {case.shape} · {case.dtype} · {where} · "
        f"{case.routing} routing (max/mean load {load:.2f}) · {records[0]['rounds']} rounds",
        (
            "implementation",
            "ms",
            "min–max",
            "of limit",
            "of fastest",
            "GFLOP/s",
            "peak MiB",
            "difference",
        ),
        [
            (
                record["implementation"],
                f"{1e3 * record['seconds'][1]:.1f}",
                f"{1e3 * record['seconds'][0]:.1f}–{1e3 * record['seconds'][2]:.1f}",
                f"{record['ratio_to_limit']:.2f}",
                f"{record['ratio_to_fastest_limit']:.2f}",
                f"{record['gflops_per_second']:.0f}",
                _mebibytes(record["peak_memory_bytes"]),
                _worst(record["relative_difference"]),
            )
            for record in records
        ],
    )


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def _worst(differences: dict[str, float] | None) -> str:
    return "" if differences is None else f"{max(differences.values()):.0e}"


if __name__ == "__main__":
    ignore_broken_pipes()
    main()
