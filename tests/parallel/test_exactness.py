"""The MoE layer on real ranks where it is easiest to get wrong: norm, order, empty ranks."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.model import Transformer
from moetrain.optim import build_optimizer
from moetrain.parallel import (
    WEIGHT_AXES,
    Gradients,
    build_meshes,
    parallelize,
    plain_name,
    resolve_topology,
)
from moetrain.settings import OptimSettings, ParallelSettings
from moetrain.train.micro_batch import MicroBatch
from moetrain.train.step import train_step
from tests.parallel.test_layouts import CPU, MODEL, RTOL, gathered
from tests.support.ranks import run_ranks
from tests.support.tensors import grad_of, sharded

SEQUENCES, SEQ_LEN = 4, 16


def build(
    *, expert: int = 1, replicate: int = 1, settings: Any = MODEL, recompute: str = "none"
) -> tuple[Transformer, Any]:
    parallel = ParallelSettings(
        expert_degree=expert, data_replicate_degree=replicate, recompute=recompute
    )
    topology = resolve_topology(
        parallel, world_size=dist.get_world_size(), num_experts=settings.num_experts,
        ffn_hidden_dim=settings.ffn_hidden_dim, ranks_per_node=8,
    )  # fmt: skip
    meshes = build_meshes(topology, device=CPU)
    with torch.device("meta"):
        model = Transformer(settings)
    model = parallelize(model, meshes, parallel, seed=0, device=CPU, compute_dtype=torch.float32)
    return model, meshes


def share(tensor: Tensor) -> Tensor:
    """Returns this rank's sequences of a global batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return tensor.chunk(world)[rank].contiguous()


def text(seed: int = 0) -> Tensor:
    """Returns a global batch; [sequences, seq_len + 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, MODEL.vocab_size, (SEQUENCES, SEQ_LEN + 1), generator=generator)


def norm_and_gradients(expert: int, replicate: int) -> dict[str, Any]:
    """Returns the norm that clipping found, and all gradients, whole, before and after it."""
    model, meshes = build(expert=expert, replicate=replicate)
    gradients = Gradients(model.parameters(), max_norm=0.25)
    tokens = share(text())
    (model(tokens[:, :-1], tokens[:, 1:]).cross_entropy / (SEQUENCES * SEQ_LEN)).backward()
    named = {n: grad_of(p) for n, p in model.named_parameters()}
    before = {n: g.copy() for n, g in gathered(named).items()}  # not a view of what is clipped
    norm = meshes.sum(gradients.square_sum(), over=WEIGHT_AXES).sqrt().item()
    gradients.clip(norm)
    return {"norm": norm, "before": before, "after": gathered(named)}


@pytest.mark.trap(2)
@pytest.mark.parametrize(
    ("world", "expert", "replicate"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 4, 1), (4, 2, 2)]
)
def test_the_norm_is_that_of_all_gradients_dense_and_expert_each_element_once(
    world: int, expert: int, replicate: int
) -> None:
    """Against numpy over the whole gradients, so that no layout serves as its own witness."""
    for found in run_ranks(norm_and_gradients, world, expert, replicate):
        squares = {
            n: float(np.square(g.astype(np.float64)).sum()) for n, g in found["before"].items()
        }
        assert found["norm"] == pytest.approx(sum(squares.values()) ** 0.5, rel=RTOL)
        experts = sum(s for n, s in squares.items() if ".experts." in n)
        assert experts > 0.01 * sum(squares.values()), "left out, they would show"
        assert found["norm"] > 0.25
        for name, gradient in found["after"].items():
            expected = found["before"][name] * (0.25 / found["norm"])
            np.testing.assert_allclose(gradient, expected, rtol=1e-6, err_msg=name)


def layer_beside_a_loop(expert: int) -> float:
    """Returns the largest error of a token's output beside a loop over the experts it chose."""
    model, _ = build(expert=expert)
    seen: dict[str, Tensor] = {}
    moe = model.moe_layers()[1]
    moe.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out[0]))
    moe.router.register_forward_hook(
        lambda _, __, routing: seen.update(experts=routing.experts, gates=routing.gates)
    )
    tokens = share(text())
    model(tokens[:, :-1], tokens[:, 1:]).cross_entropy.backward()
    weights = [sharded(w) for w in (moe.experts.gate, moe.experts.up, moe.experts.down)]
    gate, up, down = (w.full_tensor().detach() for w in weights)
    assert len(gate) == MODEL.num_experts
    assert len(weights[0].to_local()) == MODEL.num_experts // expert > 1
    errors = []
    for x, chosen, gates, out in zip(
        seen["x"], seen["experts"], seen["gates"], seen["out"], strict=True
    ):
        expected = torch.zeros_like(x)
        for e, weight in zip(chosen.tolist(), gates, strict=True):
            expected += weight * (F.silu(gate[e] @ x) * (up[e] @ x)) @ down[e]
        errors.append(float((out - expected).norm() / expected.norm()))
    assert len(set(seen["experts"].flatten().tolist())) == MODEL.num_experts
    return max(errors)


@pytest.mark.trap(10)
def test_each_token_of_a_spread_layer_equals_a_loop_over_its_experts() -> None:
    """Expert degree 2, two experts on each rank, top-2."""
    additions = MODEL.dim + MODEL.ffn_hidden_dim + MODEL.top_k
    for error in run_ranks(layer_beside_a_loop, 2, 2):
        assert error < 4 * torch.finfo(torch.float32).eps * additions**0.5


def gradients_by_expert(chosen: list[int], recompute: str) -> dict[str, Any]:
    """Every token of every layer chooses the same experts; returns each expert's gradients."""
    model, _ = build(expert=2, recompute=recompute)
    for moe in model.moe_layers():
        moe.router.select = lambda scores: torch.tensor([chosen]).expand(len(scores), 2)
    tokens = share(text())
    model(tokens[:, :-1], tokens[:, 1:]).cross_entropy.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing, missing
    return {
        plain_name(n): sharded(p.grad).full_tensor().abs().sum((1, 2)).tolist()
        for n, p in model.named_parameters()
        if p.ndim == 3
    }


@pytest.mark.trap(6)
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("chosen", [[2, 3], [0, 1], [1, 0]])
def test_the_rank_that_gets_no_token_ends_with_zero_gradients_in_every_layer(
    chosen: list[int], recompute: str
) -> None:
    for by_name in run_ranks(gradients_by_expert, 2, chosen, recompute):
        assert len(by_name) == 3 * MODEL.num_layers
        for name, by_expert in by_name.items():
            for expert, size in enumerate(by_expert):
                assert (size > 0) == (expert in chosen), f"{name} of expert {expert}"


def train_with_mask(
    kept: list[tuple[int, int]],
    noise: int,
    poison: bool,
    steps: int,
    expert: int,
    chosen: list[int] | None = None,
) -> dict[str, Any]:
    """Trains some steps in which the `kept` places alone are valid; the others hold noise.

    With `chosen`, every token takes these experts.
    """
    settings = dataclasses.replace(
        MODEL, router=dataclasses.replace(MODEL.router, bias_update_rate=0.01)
    )
    model, meshes = build(expert=expert, settings=settings)
    if chosen:
        for moe in model.moe_layers():
            moe.router.select = lambda scores: torch.tensor([chosen]).expand(len(scores), 2)
    gradients = Gradients(model.parameters(), max_norm=None)
    optimizer = build_optimizer(model.parameters(), OptimSettings(name="sgd", lr=0.1))
    seen: dict[str, Any] = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update(gathered({n: grad_of(p) for n, p in model.named_parameters()}))
    )
    if poison:
        # Torch then fills what it allocates and doesn't write with nan. Its setting is a property
        # that the module gets when it is imported, which no checker of types sees.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # as said
        assert torch.empty(3).isnan().all()
    reports = []
    for step in range(steps):
        whole, valid = text(step), torch.zeros(SEQUENCES, SEQ_LEN, dtype=torch.bool)
        for sequence, length in kept:
            valid[sequence, :length] = True
        padding = ~torch.cat((torch.ones(SEQUENCES, 1, dtype=torch.bool), valid), 1)
        padding[:, 0] = ~valid[:, 0]
        whole[padding] = text(1000 + noise)[padding]
        batch = MicroBatch(
            tokens=share(whole[:, :-1]), targets=share(whole[:, 1:]), valid=share(valid)
        )
        report = train_step(
            [batch],
            model=model,
            optimizer=optimizer,
            gradients=gradients,
            meshes=meshes,
            learning_rate=0.1,
        )
        figures = dataclasses.asdict(report) | {"expert_counts": report.expert_counts.numpy()}
        figures |= figures.pop("metric_sums")  # an extension's, by their names
        figures |= figures.pop("grad_norms")
        reports.append({name: value for name, value in figures.items() if value is not None})
    biases = np.stack([moe.router.bias.numpy() for moe in model.moe_layers()])
    weights = gathered(dict(model.named_parameters()))
    return {"reports": reports, "gradients": seen, "bias": biases, "weights": weights}


def assert_alike(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compares two trainings: counts and biases exactly, all else up to rounding."""
    np.testing.assert_array_equal(ours["bias"], theirs["bias"])
    for mine, other in zip(ours["reports"], theirs["reports"], strict=True):
        for name, value in mine.items():
            np.testing.assert_allclose(value, other[name], rtol=RTOL, err_msg=name)
    for kind in ("gradients", "weights"):
        sizes = {name: float(np.linalg.norm(value)) for name, value in theirs[kind].items()}
        # What cancels to nothing, as the gradient of a lone position's query, leaves rounding of
        # the numbers that it was made of, at most the size of them all.
        noise = np.finfo(np.float32).eps * sum(s**2 for s in sizes.values()) ** 0.5
        for name, value in ours[kind].items():
            error = np.linalg.norm(value - theirs[kind][name])
            assert error <= RTOL * sizes[name] + noise, f"{kind} {name}"


@pytest.mark.trap(6)
def test_one_valid_token_in_all_trains_as_on_one_rank() -> None:
    """It stands on rank 0; the second rank has nothing to learn from, and takes part."""
    alone = run_ranks(train_with_mask, 1, [(0, 1)], 0, False, 2, 1)[0]
    assert [r["num_tokens"] for r in alone["reports"]] == [1, 1]
    assert alone["reports"][0]["expert_counts"].sum() == MODEL.top_k * MODEL.num_layers
    for spread in run_ranks(train_with_mask, 2, [(0, 1)], 0, False, 2, 2):
        assert all(np.isfinite(g).all() for g in spread["gradients"].values())
        assert_alike(spread, alone)


@pytest.mark.trap(12)
@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 2)])
def test_what_stands_in_padding_changes_nothing(world: int, expert: int) -> None:
    """Not loss, norm, balance and z losses, entropy, loads, selection bias, gradients, weights."""
    kept = [(0, 16), (1, 5), (3, 9)]  # the third sequence is all padding
    one, other = (
        run_ranks(train_with_mask, world, kept, noise, False, 2, expert)[0] for noise in (0, 1)
    )
    for report in one["reports"]:
        assert report["num_tokens"] == 30
        assert (report["expert_counts"].sum(1) == 30 * MODEL.top_k).all()
    assert np.abs(one["bias"]).max() > 0
    assert_alike(one, other)


@pytest.mark.trap(7)
@pytest.mark.parametrize("chosen", [None, [0, 2], [2, 3]])
@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 2)])
def test_memory_that_is_never_written_is_never_read(
    world: int, expert: int, chosen: list[int] | None
) -> None:
    """With tokens for all experts, for one of two on each rank, and for those of one rank alone.

    Two steps, because a nan in a row that nobody wanted shows in the second.
    """
    kept = [(0, 16), (1, 5), (3, 9)]
    clean, poisoned = (
        run_ranks(train_with_mask, world, kept, 0, poison, 2, expert, chosen)[0]
        for poison in (False, True)
    )
    assert not any(report["skipped"] for report in poisoned["reports"])
    for kind in ("gradients", "weights"):
        for name, value in poisoned[kind].items():
            assert np.isfinite(value).all(), name
    assert_alike(poisoned, clean)
