"""Sharding, initialisation, recomputation and mixed precision of the parallel model."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.model import LossSums, Transformer
from moetrain.model.router import Router
from moetrain.optim import build_optimizer
from moetrain.parallel import (
    Gradients,
    begin_micro_batch,
    build_meshes,
    parallelize,
    plain_name,
    resolve_topology,
)
from moetrain.parallel.all_to_all_exchange import _Counting
from moetrain.parallel.transfer import Transfer
from moetrain.settings import ExchangeSettings, OptimSettings, ParallelSettings
from moetrain.train.micro_batch import MicroBatch
from moetrain.train.step import train_step
from tests.parallel.test_layouts import CPU, MODEL
from tests.support.ranks import replace_in_rank, run_ranks
from tests.support.tensors import sharded


def build(
    *,
    expert: int = 1,
    recompute: str = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_rounds: int = 1,
    replicate: int = 1,
) -> tuple[Transformer, Any]:
    exchange = ExchangeSettings(num_rounds=num_rounds)
    parallel = ParallelSettings(
        expert_degree=expert, recompute=recompute, exchange=exchange,
        data_replicate_degree=replicate,
    )  # fmt: skip
    topology = resolve_topology(
        parallel, world_size=dist.get_world_size(), num_experts=MODEL.num_experts,
        ffn_hidden_dim=MODEL.ffn_hidden_dim, ranks_per_node=8,
    )  # fmt: skip
    meshes = build_meshes(topology, device=CPU)
    with torch.device("meta"):
        model = Transformer(MODEL)
    model = parallelize(model, meshes, parallel, seed=seed, device=CPU, compute_dtype=dtype)
    return model, meshes


def text(seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(seed))


def whole_gradients(model: Transformer) -> dict[str, Any]:
    """Returns every parameter's gradient, of all ranks together; collective."""
    named = ((plain_name(n), sharded(p.grad)) for n, p in model.named_parameters())
    return {name: gradient.full_tensor().numpy() for name, gradient in named}


def initial_weights(expert: int, seed: int) -> dict[str, Any]:
    """Returns the full initial weights as this rank sees them gathered."""
    model, _ = build(expert=expert, seed=seed)
    return {n: sharded(p).full_tensor().detach().numpy() for n, p in model.named_parameters()}


@pytest.mark.trap(14)
def test_initial_weights_depend_on_the_seed_alone_and_no_two_experts_are_alike() -> None:
    reference = run_ranks(initial_weights, 1, 1, 0)[0]
    for world, expert in ((2, 2), (4, 2), (4, 4)):
        for weights in run_ranks(initial_weights, world, expert, 0):
            for name, value in weights.items():
                assert (value == reference[name]).all(), name
    other = run_ranks(initial_weights, 1, 1, 1)[0]
    for name, value in reference.items():
        if value.ndim == 1:
            continue
        assert (value != other[name]).mean() > 0.99
        assert abs(value).max() <= 3.0 * MODEL.dim**-0.5
        if value.ndim == 3:
            flat = value.reshape(len(value), -1)
            assert all((flat[0] != row).mean() > 0.99 for row in flat[1:])


def gradients_with_unstable_choice(recompute: str, expert: int) -> dict[str, Any]:
    """Returns gradients where every new choice of experts falls differently than the last.

    Each router's scores are all tied and its top-k picks at random: a stand-in for near-ties
    that rounding decides. The n-th choice of the forward pass is the same in each call of this
    function, whatever comes after it.
    """
    model, _ = build(expert=expert, recompute=recompute)
    made: dict[int, int] = {}
    routers = [m for m in model.modules() if isinstance(m, Router)]

    def unstable(router: Router) -> Any:
        def select(scores: Tensor) -> Tensor:
            layer = routers.index(router)
            made[layer] = made.get(layer, 0) + 1
            generator = torch.Generator().manual_seed(1000 * made[layer] + layer)
            return torch.rand(scores.shape, generator=generator).topk(router.top_k).indices

        return select

    for router in routers:
        router.select = unstable(router)
    tokens = text()
    output = model(tokens[:, :-1], tokens[:, 1:])
    output.cross_entropy.backward()
    return {"gradients": whole_gradients(model), "choices": sum(made.values())}


@pytest.mark.trap(8)
@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 2)])
def test_recomputation_never_routes_again(world: int, expert: int) -> None:
    plain = run_ranks(gradients_with_unstable_choice, world, "none", expert)[0]
    again = run_ranks(gradients_with_unstable_choice, world, "full", expert)[0]
    assert plain["choices"] == again["choices"] == MODEL.num_layers
    for name, value in again["gradients"].items():
        assert (value == plain["gradients"][name]).all(), name


def exchanges(recompute: str, num_rounds: int) -> dict[str, int]:
    """Returns how often counts were gathered, and transfers started and waited for, in a step."""
    model, _ = build(expert=2, recompute=recompute, num_rounds=num_rounds)
    made = {"counted": 0, "started": 0, "waited for": 0}

    def counting(owner: Any, method: str, name: str) -> None:
        real = getattr(owner, method)

        def counted(*arguments: Any, **named: Any) -> Any:
            made[name] += 1
            return real(*arguments, **named)

        replace_in_rank(owner, method, counted)

    counting(_Counting, "read", "counted")
    counting(Transfer, "start", "started")
    counting(Transfer, "finish", "waited for")
    tokens = text(dist.get_rank())
    model(tokens[:, :-1], tokens[:, 1:]).cross_entropy.backward()
    return made


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_recomputation_counts_nothing_again_and_leaves_no_transfer_in_flight(
    num_rounds: int,
) -> None:
    layers = MODEL.num_moe_layers
    for recompute in ("none", "full"):
        for made in run_ranks(exchanges, 2, recompute, num_rounds):
            assert made["counted"] == layers
            assert made["started"] == made["waited for"]
            # Rows, metadata and results of each round, and their gradients.
            assert made["started"] >= 6 * num_rounds * layers


def tied_logits(recompute: str) -> dict[str, Any]:
    """Returns gradients and counts where all of a router's logits are equal."""
    model, _ = build(expert=2, recompute=recompute)
    for moe in model.moe_layers():
        with torch.no_grad():
            sharded(moe.router.weight).to_local().zero_()
    tokens = text(dist.get_rank())
    output = model(tokens[:, :-1], tokens[:, 1:])
    output.cross_entropy.backward()
    return {"counts": output.routing.counts.numpy(), "gradients": whole_gradients(model)}


@pytest.mark.trap(8)
def test_tied_logits_under_full_recomputation_count_once_and_match() -> None:
    plain, again = (run_ranks(tied_logits, 2, how)[0] for how in ("none", "full"))
    assert (plain["counts"] == again["counts"]).all()
    assert plain["counts"].sum() == 4 * 16 * MODEL.top_k * MODEL.num_layers
    for name, value in again["gradients"].items():
        assert (value == plain["gradients"][name]).all(), name


def train_in(dtype_name: str) -> dict[str, Any]:
    """Trains a few steps with weights gathered in a dtype; looks into the router on the way."""
    model, meshes = build(expert=2, dtype=getattr(torch, dtype_name))
    seen: dict[str, Any] = {}
    moe = model.moe_layers()[0]
    moe.register_forward_hook(lambda m, args, out: seen.update(x=str(args[0].dtype)))
    model.get_submodule("layers.0.attention").register_forward_hook(
        lambda m, args, out: seen.update(rotary={str(table.dtype) for table in args[1]})
    )
    moe.router.register_forward_hook(
        lambda m, args, out: seen.update(weight=str(m.weight.dtype), gates=str(out.gates.dtype))
    )
    optimizer = build_optimizer(model.parameters(), OptimSettings(lr=0.01))
    gradients = Gradients(model.parameters(), max_norm=1.0)
    losses = []
    for step in range(5):
        tokens = text(step * 2 + dist.get_rank())
        batch = MicroBatch(
            tokens=tokens[:, :-1], targets=tokens[:, 1:], valid=torch.ones(4, 16, dtype=torch.bool)
        )
        report = train_step(
            [batch],
            model=model,
            optimizer=optimizer,
            gradients=gradients,
            meshes=meshes,
            learning_rate=0.01,
        )
        losses.append(report.cross_entropy)
    stored = {str(p.dtype) for p in model.parameters()} | {str(b.dtype) for b in model.buffers()}
    return {"losses": losses, "stored": stored, **seen}


class CountCollectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = str(func).split(".")[1]
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def collectives(expert: int, replicate: int, recompute: str, every: str) -> dict[str, int]:
    """Returns how often each kind of collective runs in a step of three micro-batches."""
    settings = ParallelSettings(
        expert_degree=expert, data_replicate_degree=replicate, recompute=recompute,
        gather_weights=every, reduce_gradients=every,
    )  # fmt: skip
    model, meshes = build(expert=expert, recompute=recompute, replicate=replicate)
    optimizer = build_optimizer(model.parameters(), OptimSettings(name="sgd", lr=0.01))
    batches = [
        MicroBatch(
            tokens=tokens[:, :-1], targets=tokens[:, 1:], valid=torch.ones(4, 16, dtype=torch.bool)
        )
        for tokens in map(text, range(3))
    ]
    # The balance loss of each micro-batch: that of the global batch counts in a pass before.
    router = dataclasses.replace(MODEL.router, load_balance_scope="micro_batch")
    model.settings = dataclasses.replace(model.settings, router=router)
    with CountCollectives() as watched:
        train_step(
            batches,
            model=model,
            optimizer=optimizer,
            gradients=Gradients(model.parameters(), max_norm=1.0),
            meshes=meshes,
            learning_rate=0.01,
            begin_micro_batch=partial(begin_micro_batch, model, settings),
        )
    counts: dict[str, int] = watched.counts
    return counts


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weights_are_gathered_and_gradients_reduced_once_a_step_where_settings_say_so(
    recompute: str,
) -> None:
    """Four ranks: two shards of each expert, four of everything else."""
    modules = 1 + 2 * MODEL.num_layers  # the root, blocks, experts
    counts = MODEL.num_layers * 3  # of the exchange, in each layer and micro-batch
    each = run_ranks(collectives, 4, 2, 1, recompute, "micro_batch")[0]
    once = run_ranks(collectives, 4, 2, 1, recompute, "step")[0]
    assert each["_reduce_scatter_base_"] == 3 * modules
    assert once["_reduce_scatter_base_"] == modules
    assert once["_allgather_base_"] == modules + counts
    assert each["_allgather_base_"] > 3 * modules + counts
    # Tokens of the batch, and the figures and the norm at the end: no axis of one rank takes any.
    assert each["allreduce_"] == once["allreduce_"] == 2


def test_replicas_sum_gradients_over_their_axis_and_one_rank_alone_over_none() -> None:
    modules = 1 + 2 * MODEL.num_layers
    found = run_ranks(collectives, 4, 2, 2, "none", "step")[0]
    assert found["allreduce_"] == 2 + modules
    alone = run_ranks(collectives, 1, 1, 1, "none", "micro_batch")[0]
    assert alone == {}


@pytest.mark.trap(9)
def test_in_bfloat16_the_router_and_everything_stored_stay_float32() -> None:
    exact, rough = (run_ranks(train_in, 2, name)[0] for name in ("float32", "bfloat16"))
    assert rough["x"] == "torch.bfloat16", "the model around the router is in bfloat16"
    assert rough["weight"] == rough["gates"] == "torch.float32"
    assert rough["rotary"] == {"torch.float32"}
    assert rough["stored"] == {"torch.float32"}
    # bfloat16 keeps 8 bits: a loss of about 4.3 nats agrees to a few of its last places.
    for ours, theirs in zip(rough["losses"], exact["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=4 * 2**-8)


def gradients_in_bfloat16(*seeds: int) -> dict[str, Any]:
    """Returns the gradients of the text of each rank's seed, summed over ranks."""
    model, _ = build(dtype=torch.bfloat16)
    tokens = text(seeds[dist.get_rank()])
    output = model(tokens[:, :-1], tokens[:, 1:])
    assert isinstance(output, LossSums)
    output.cross_entropy.backward()
    return whole_gradients(model)


@pytest.mark.trap(33)
def test_gradients_add_up_over_ranks_in_float32() -> None:
    """Each rank's are of bfloat16. Their sum has more bits, which a sum in bfloat16 would drop."""
    together = run_ranks(gradients_in_bfloat16, 2, 0, 1)[0]
    first, second = (run_ranks(gradients_in_bfloat16, 1, seed)[0] for seed in (0, 1))
    for name, gradient in together.items():
        assert (gradient == first[name] + second[name]).all(), name


def all_tokens_to_one_rank() -> dict[str, Any]:
    """Every token chooses the experts of the last rank; returns gradients' sums by expert."""
    model, _ = build(expert=2)
    for moe in model.moe_layers():
        moe.router.select = lambda scores: torch.tensor([[2, 3]]).expand(len(scores), 2)
    tokens = text(dist.get_rank())
    output = model(tokens[:, :-1], tokens[:, 1:])
    assert isinstance(output, LossSums)
    output.cross_entropy.backward()
    assert all(p.grad is not None for p in model.parameters())
    gate = sharded(model.moe_layers()[0].experts.get_parameter("gate").grad).full_tensor()
    return {"by expert": gate.abs().sum((1, 2)).tolist()}


@pytest.mark.trap(6)
def test_a_rank_without_tokens_ends_with_zero_gradients_not_none() -> None:
    sums = run_ranks(all_tokens_to_one_rank, 2)[0]["by expert"]
    assert sums[:2] == [0.0, 0.0]
    assert min(sums[2:]) > 0.0
