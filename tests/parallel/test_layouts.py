"""One global batch under many layouts: the same loss, gradients, norm, weights and statistics.

SGD in float32 on real gloo ranks: Adam would hide a wrong scale.
"""

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.model import Documents, Transformer, initial_values
from moetrain.model.roles import Role, role_of
from moetrain.optim import build_optimizer
from moetrain.parallel import (
    Gradients,
    begin_micro_batch,
    build_meshes,
    parallelize,
    plain_name,
    resolve_topology,
)
from moetrain.settings import (
    ExchangeSettings,
    GroupSettings,
    GroupsSettings,
    InitSettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
    RopeScalingSettings,
    RouterSettings,
)
from moetrain.train.micro_batch import MicroBatch
from moetrain.train.parameter_groups import freeze, parameter_roles
from moetrain.train.step import train_step
from moetrain.train.weight_norms import WeightNorms
from tests.support.ranks import run_ranks
from tests.support.tensors import grad_of

CPU = torch.device("cpu")
# Weights large enough on the balance and z losses for a wrong scale of theirs to show.
MODEL = ModelSettings(
    dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_hidden_dim=48,
    num_experts=4, top_k=2, vocab_size=64, max_seq_len=64, rope_theta=1e4,
    router=RouterSettings(load_balance_loss_weight=0.5, z_loss_weight=0.1, bias_update_rate=0.01),
)  # fmt: skip
# Everything that DeepSeek's models add, and jitter: a dense first layer, shared experts, sigmoid
# scores with a bias and groups, the balance of each sequence; and a z-loss of the head.
DEEPSEEK = dataclasses.replace(
    MODEL, num_layers=3, num_experts=8, top_k=3, ffn_hidden_dim=24, num_shared_experts=2,
    num_dense_layers=1, dense_ffn_hidden_dim=40, qk_norm=True, head_z_loss_weight=0.05,
    router=RouterSettings(
        score_function="sigmoid", num_groups=4, top_groups=2, routed_scaling_factor=2.5,
        load_balance_loss_weight=0.5, load_balance_scope="sequence", z_loss_weight=0.1,
        bias_update_rate=0.01, jitter_noise=0.1,
    ),
)  # fmt: skip
# Everything else that attention can have, a head that is the embedding, what else a
# head can have, and other initial weights.
GLM = dataclasses.replace(
    MODEL, qk_norm=True, qk_norm_scope="head", clip_qkv=1.0, attention_bias=True,
    attention_output_bias=True,
    partial_rotary_factor=0.5, tie_embeddings=True, logit_soft_cap=2.0, head_z_loss_weight=0.1,
    rope_scaling=RopeScalingSettings(type="yarn", factor=4.0, original_max_seq_len=16),
    init=InitSettings(
        std=0.15, truncate_at=None, residual_scale="layer", embedding_std=0.2, router_std=0.3
    ),
)  # fmt: skip
ALL_ALIKE = GroupsSettings()
SEQUENCES, SEQ_LEN, STEPS = 8, 16, 3
MAX_NORM = 0.5  # below the norm of every step here, so that clipping takes part
# A step's gradients are sums over 128 tokens and two layers; three SGD steps let rounding grow.
RTOL = 2e-5

SOURCES = 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout to compare; `world` ranks."""

    world: int
    expert: int = 1
    replicate: int = 1
    micro_batch: int | None = None
    recompute: str = "none"
    exchange: str = "once"
    recompute_experts: bool = False
    gather: str = "micro_batch"
    reduce: str = "micro_batch"

    def __str__(self) -> str:
        return (
            f"world{self.world}-expert{self.expert}-replicate{self.replicate}"
            f"-micro{self.micro_batch}-recompute_{self.recompute}-{self.exchange.replace(' ', '_')}"
            f"{'-recompute_experts' if self.recompute_experts else ''}"
            f"{'-gathered_once' if self.gather == 'step' else ''}"
            f"{'-reduced_once' if self.reduce == 'step' else ''}"
        )


EXCHANGES = {
    "once": ExchangeSettings(),
    "each assignment": ExchangeSettings(send_once=False),
    "three rounds": ExchangeSettings(num_rounds=3),
    "bounded": ExchangeSettings(max_load=1.0),  # routing is never even: always some rounds
}


LAYOUTS = [
    Layout(2),
    Layout(2, expert=2),
    Layout(2, replicate=2),
    Layout(4),
    Layout(4, expert=2),
    Layout(4, expert=4),
    Layout(4, expert=2, replicate=2),
    Layout(1, micro_batch=2),
    Layout(2, expert=2, micro_batch=1),
    Layout(1, recompute="full"),
    Layout(2, expert=2, recompute="full"),
    Layout(4, expert=2, recompute="full", micro_batch=1),
    Layout(1, recompute_experts=True),
    Layout(2, expert=2, exchange="each assignment"),
    Layout(2, expert=2, exchange="three rounds", recompute_experts=True),
    Layout(4, expert=2, exchange="bounded"),
    Layout(2, expert=2, exchange="bounded", recompute="full"),
    Layout(2, micro_batch=1, reduce="step"),
    Layout(4, expert=2, micro_batch=1, gather="step"),
    Layout(4, expert=2, replicate=2, micro_batch=1, gather="step", reduce="step"),
    Layout(4, expert=2, micro_batch=1, recompute="full", gather="step", reduce="step"),
]


def train_steps(
    layout: Layout,
    settings: ModelSettings,
    mask: bool,
    by_document: bool = False,
    groups: GroupsSettings = ALL_ALIKE,
) -> dict[str, Any]:
    """Trains STEPS steps of SGD as one rank; returns reports, gradients and weights, gathered."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parallel = ParallelSettings(
        expert_degree=layout.expert,
        data_replicate_degree=layout.replicate,
        recompute=layout.recompute,
        exchange=EXCHANGES[layout.exchange],
        gather_weights=layout.gather,
        reduce_gradients=layout.reduce,
    )
    experts = dataclasses.replace(settings.experts, recompute=layout.recompute_experts)
    settings = dataclasses.replace(settings, experts=experts)
    topology = resolve_topology(
        parallel,
        world_size=world,
        num_experts=settings.num_experts,
        ffn_hidden_dim=settings.ffn_hidden_dim,
        ranks_per_node=8,
    )
    meshes = build_meshes(topology, device=CPU)
    with torch.device("meta"):
        model = Transformer(settings)
    optim = OptimSettings(name="sgd", lr=0.3, weight_decay=0.1, groups=groups)
    freeze(model, optim)
    model = parallelize(model, meshes, parallel, seed=0, device=CPU, compute_dtype=torch.float32)
    initial = gathered({plain_name(n): p for n, p in model.named_parameters()})
    roles = parameter_roles(model)
    optimizer = build_optimizer(model.parameters(), optim, roles=roles)
    gradients = Gradients(model.parameters(), max_norm=MAX_NORM, roles=list(roles.values()))
    norms = WeightNorms(model, meshes, updates=True)
    names = [plain_name(name) for name, _ in model.named_parameters()]
    seen: dict[str, Any] = {"roles": dict(zip(names, roles.values(), strict=True))}

    def remember_gradients(*_: object) -> None:
        parameters = {plain_name(n): p for n, p in model.named_parameters()}
        seen["before"] = gathered({n: p.detach() for n, p in parameters.items()})
        seen["gradients"] = gathered(
            {n: grad_of(p) for n, p in parameters.items() if p.requires_grad}
        )
        assert all(p.requires_grad or p.grad is None for p in parameters.values())

    optimizer.register_step_pre_hook(remember_gradients)
    generator = torch.Generator().manual_seed(5)
    reports = []
    for step in range(STEPS):
        text = torch.randint(0, settings.vocab_size, (SEQUENCES, SEQ_LEN + 1), generator=generator)
        valid = torch.ones(SEQUENCES, SEQ_LEN, dtype=torch.bool)
        if mask:  # uneven between ranks, one sequence wholly masked
            valid[0] = False
            valid[3, 5:] = False
        starts = torch.rand(SEQUENCES, SEQ_LEN, generator=generator) < 0.2
        share = slice(rank * SEQUENCES // world, (rank + 1) * SEQUENCES // world)
        size = layout.micro_batch or SEQUENCES // world
        seeds = torch.arange(step * SEQUENCES, (step + 1) * SEQUENCES)[share]
        micro_batches = [
            MicroBatch(
                tokens=x,
                targets=y,
                valid=m,
                sources=s % SOURCES,
                noise_seeds=s.tolist(),
                documents=Documents.of(d, device=CPU) if by_document else None,
            )
            for x, y, m, s, d in zip(
                text[share, :-1].split(size),
                text[share, 1:].split(size),
                valid[share].split(size),
                seeds.split(size),
                starts[share].split(size),
                strict=True,
            )
        ]
        report = train_step(
            micro_batches,
            model=model,
            optimizer=optimizer,
            gradients=gradients,
            meshes=meshes,
            learning_rate=0.3,
            begin_micro_batch=partial(begin_micro_batch, model, parallel),
            num_sources=SOURCES,
            before_update=norms.remember,
        )
        figures = dataclasses.asdict(report) | {"expert_counts": report.expert_counts.numpy()}
        figures |= figures.pop("metric_sums")  # an extension's, by their names
        figures |= figures.pop("grad_norms") | norms.measure()
        reports.append({name: value for name, value in figures.items() if value is not None})
    named = {plain_name(n): p for n, p in model.named_parameters()} | dict(model.named_buffers())
    seen |= {"reports": reports, "weights": gathered(named), "initial": initial}
    return seen if rank == 0 else {"weights": seen["weights"]}


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Returns full assignments of distributed tensors; collective."""
    return {
        plain_name(name): np.array(
            (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().numpy()
        )
        for name, t in tensors.items()
    }


def assert_same(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    """Compares everything that must not depend on the layout."""
    for mine, theirs in zip(ours["reports"], reference["reports"], strict=True):
        np.testing.assert_array_equal(mine.pop("expert_counts"), theirs["expert_counts"])
        for name, value in mine.items():
            np.testing.assert_allclose(value, theirs[name], rtol=RTOL, err_msg=name)
    for kind in ("gradients", "weights"):
        assert ours[kind].keys() == reference[kind].keys()
        for name, value in ours[kind].items():
            expected = reference[kind][name]
            scale = np.linalg.norm(expected)
            error = np.linalg.norm(value - expected)
            assert error <= RTOL * scale, f"{kind} {name}: {error / scale}"


def norm_by_role(tensors: dict[str, np.ndarray], roles: dict[str, str]) -> dict[str, float]:
    """Returns the norms of whole tensors by role."""
    squares: dict[str, float] = {}
    for name, role in roles.items():
        square = float(np.square(tensors[name].astype(np.float64)).sum())
        squares[role] = squares.get(role, 0.0) + square
    return {role: square**0.5 for role, square in squares.items()}


def test_norms_by_role_are_those_of_the_whole_tensors(
    reference: tuple[bool, dict[str, Any]],
) -> None:
    """Of gradients before clipping, weights after the step, and the step's update beside these."""
    _, found = reference
    last, roles = found["reports"][-1], found["roles"]
    assert set(roles.values()) == {"embedding", "norm", "attention", "router", "experts", "head"}
    clipped = norm_by_role(found["gradients"], roles)
    weights, before = found["weights"], found["before"]
    updates = norm_by_role({n: weights[n] - before[n] for n in roles}, roles)
    of_weights, of_before = norm_by_role(weights, roles), norm_by_role(before, roles)
    for role in updates:
        assert last[role] * last["clip_factor"] == pytest.approx(clipped[role], rel=RTOL)
        assert last[f"optim/weight_norm/{role}"] == pytest.approx(of_weights[role], rel=RTOL)
        assert last[f"optim/update_ratio/{role}"] == pytest.approx(
            updates[role] / of_before[role], rel=RTOL
        )
    whole = sum(last[role] ** 2 for role in updates) ** 0.5
    assert last["grad_norm"] == pytest.approx(whole, rel=1e-12)
    assert last["clip_factor"] == pytest.approx(MAX_NORM / last["grad_norm"], rel=1e-12)
    for report in found["reports"]:
        nats = sum(report["source_nats"])
        assert nats == pytest.approx(report["cross_entropy"] * report["num_tokens"], rel=RTOL)
        assert min(report["source_nats"]) > 0


@pytest.fixture(scope="module", params=[False, True], ids=["all valid", "masked"])
def reference(request: pytest.FixtureRequest) -> tuple[bool, dict[str, Any]]:
    return request.param, run_ranks(train_steps, 1, Layout(1), MODEL, request.param)[0]


@pytest.mark.trap(1, 2, 3, 4, 14)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loss_gradients_norm_and_sgd_trajectory_equal_one_rank(
    layout: Layout, reference: tuple[bool, dict[str, Any]]
) -> None:
    mask, expected = reference
    assert all(r["grad_norm"] > MAX_NORM for r in expected["reports"])
    first, *others = run_ranks(train_steps, layout.world, layout, MODEL, mask)
    assert_same(first, expected)
    for other in others:  # replicas stay equal to the bit, and so does what all ranks hold
        for name, weight in other["weights"].items():
            np.testing.assert_array_equal(weight, first["weights"][name], err_msg=name)


@pytest.mark.trap(3, 8)
def test_attention_that_stops_at_document_ends_trains_the_same_on_every_layout() -> None:
    expected = run_ranks(train_steps, 1, Layout(1), MODEL, True, True)[0]
    across = run_ranks(train_steps, 1, Layout(1), MODEL, True, False)[0]
    assert expected["reports"][0]["loss"] != pytest.approx(across["reports"][0]["loss"], rel=RTOL)
    for layout in (
        Layout(2, expert=2, micro_batch=1, recompute="full"),
        Layout(4, expert=2, replicate=2),
    ):
        ours = run_ranks(train_steps, layout.world, layout, MODEL, True, True)[0]
        assert_same(ours, expected)


def test_more_expert_shards_than_experts_divide_them() -> None:
    """Two experts on four ranks: each expert's weights are split over two of them."""
    settings = dataclasses.replace(MODEL, num_experts=2, top_k=1)
    settings = dataclasses.replace(
        settings, router=dataclasses.replace(MODEL.router, normalize_gates=False)
    )
    expected = run_ranks(train_steps, 1, Layout(1), settings, False)[0]
    assert_same(run_ranks(train_steps, 4, Layout(4, expert=2), settings, False)[0], expected)


def test_a_dense_model_trains_the_same_on_every_layout() -> None:
    settings = dataclasses.replace(MODEL, num_experts=1, top_k=1)
    expected = run_ranks(train_steps, 1, Layout(1), settings, False)[0]
    for layout in (Layout(2), Layout(4, replicate=2)):
        assert_same(run_ranks(train_steps, layout.world, layout, settings, False)[0], expected)


@pytest.fixture(scope="module")
def deepseek_reference() -> dict[str, Any]:
    return run_ranks(train_steps, 1, Layout(1), DEEPSEEK, True)[0]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2),
        Layout(2, expert=2),
        Layout(4, expert=2, replicate=2),
        Layout(4, expert=4),
        Layout(1, micro_batch=2, recompute="full"),
        Layout(4, expert=2, micro_batch=1, recompute="full"),
    ],
    ids=str,
)
def test_deepseeks_router_shared_experts_and_dense_layer_train_the_same_on_every_layout(
    layout: Layout, deepseek_reference: dict[str, Any]
) -> None:
    assert deepseek_reference["reports"][0]["expert_counts"].shape == (2, 8)
    ours = run_ranks(train_steps, layout.world, layout, DEEPSEEK, True)[0]
    assert_same(ours, deepseek_reference)


# Frozen on both sides of what is trained, and weights whose rate differs from their neighbours'.
GROUPS = {
    "several": GroupsSettings(
        embedding=GroupSettings(frozen=True),
        shared_experts=GroupSettings(frozen=True),
        router=GroupSettings(lr_factor=0.25),
        experts=GroupSettings(lr_factor=2.0, weight_decay_factor=0.0),
        head=GroupSettings(weight_decay_factor=5.0),
    ),
    "experts alone": GroupsSettings(
        **{
            role: GroupSettings(frozen=True)
            for role in ("embedding", "attention", "norm", "router", "shared_experts")
        },
        dense=GroupSettings(frozen=True),
        head=GroupSettings(frozen=True),
    ),
    "all but the experts": GroupsSettings(experts=GroupSettings(frozen=True)),
}


@pytest.mark.trap(1, 2)
@pytest.mark.parametrize("name", GROUPS)
def test_parameter_groups_train_the_same_on_every_layout_and_frozen_ones_not_at_all(
    name: str,
) -> None:
    groups = GROUPS[name]
    expected = run_ranks(train_steps, 1, Layout(1), DEEPSEEK, True, False, groups)[0]
    frozen = {r for r in Role if getattr(groups, r).frozen}
    for tensor, before in expected["initial"].items():
        moved = not np.array_equal(before, expected["weights"][tensor])
        assert moved == (role_of(tensor) not in frozen), tensor
        assert (tensor in expected["gradients"]) == moved
    # The last step's gradients are clipped: the norm had counted these alone.
    squares = sum(np.square(g, dtype=np.float64).sum() for g in expected["gradients"].values())
    norm = expected["reports"][-1]["grad_norm"]
    assert np.sqrt(squares) == pytest.approx(min(norm, MAX_NORM), rel=RTOL)
    for layout in (
        Layout(2, expert=2, micro_batch=1, recompute="full"),
        Layout(4, expert=2, replicate=2, micro_batch=1, gather="step", reduce="step"),
    ):
        ours = run_ranks(train_steps, layout.world, layout, DEEPSEEK, True, False, groups)[0]
        assert_same(ours, expected)


def one_process_model(settings: ModelSettings) -> Transformer:
    """Returns the model with the weights that every layout starts from."""
    model = Transformer(settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 3:
                weight.copy_(initial_values(
                    name, tuple(weight.shape), settings=settings, seed=0, device=CPU
                ))  # fmt: skip
                continue
            for expert in range(settings.num_experts):
                weight[expert] = initial_values(
                    name, tuple(weight.shape[1:]), settings=settings, seed=0, device=CPU,
                    expert=expert,
                )  # fmt: skip
    return model


def test_tied_embeddings_and_all_of_attention_train_the_same_on_every_layout() -> None:
    expected = run_ranks(train_steps, 1, Layout(1), GLM, True, True)[0]
    for layout in (
        Layout(2, expert=2, micro_batch=1, recompute="full"),
        Layout(4, expert=2, replicate=2),
    ):
        assert_same(run_ranks(train_steps, layout.world, layout, GLM, True, True)[0], expected)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.trap(4)
def test_the_logged_balance_is_the_sequences_mean_by_tokens_over_the_moe_layers_alone(
    score_function: str,
) -> None:
    """Under accumulation and recomputation, and what is added to the loss is that times weight."""
    router = dataclasses.replace(
        DEEPSEEK.router, jitter_noise=0.0, score_function=score_function, z_loss_weight=0.0
    )
    settings = dataclasses.replace(DEEPSEEK, router=router)
    layout = Layout(2, expert=2, micro_batch=1, recompute="full")
    report = run_ranks(train_steps, 2, layout, settings, True)[0]["reports"][0]
    model = one_process_model(settings)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for moe in model.moe_layers():
        moe.router.register_forward_hook(
            lambda r, args, out: seen.append((args[0] @ r.weight.t(), out.experts))
        )
    text = torch.randint(
        0, 64, (SEQUENCES, SEQ_LEN + 1), generator=torch.Generator().manual_seed(5)
    )
    valid = torch.ones(SEQUENCES, SEQ_LEN, dtype=torch.bool)
    valid[0], valid[3, 5:] = False, False
    z = model(text[:, :-1])[valid].logsumexp(-1).square().mean().item()
    assert len(seen) == 2
    layers = []
    for logits, experts in seen:
        scores = logits.sigmoid() if score_function == "sigmoid" else logits.softmax(-1)
        shares = (scores / scores.sum(-1, keepdim=True)).view(SEQUENCES, SEQ_LEN, 8)
        chosen = torch.nn.functional.one_hot(experts, 8).sum(1).view(SEQUENCES, SEQ_LEN, 8)
        total = 0.0
        for share, assignments, mask in zip(shares, chosen, valid, strict=True):
            if tokens := int(mask.sum()):
                f = assignments[mask].sum(0) * 8 / (3 * tokens)
                total += tokens * (f * share[mask].mean(0)).sum().item()
        layers.append(total / int(valid.sum()))
    assert report["load_balance_loss"] == pytest.approx(np.mean(layers), rel=RTOL)
    assert report["head_z_loss"] == pytest.approx(z, rel=RTOL)
    expected = report["cross_entropy"] + 0.5 * sum(layers) + 0.05 * z
    assert report["loss"] == pytest.approx(expected, rel=RTOL)


@pytest.mark.trap(3, 4)
@pytest.mark.parametrize("scope", ["global_batch", "micro_batch", "sequence"])
def test_what_is_logged_of_router_and_head_is_what_is_minimised(scope: str) -> None:
    """In every scope, with padding, dense layers, accumulation and recomputation."""
    settings = dataclasses.replace(
        DEEPSEEK, router=dataclasses.replace(DEEPSEEK.router, load_balance_scope=scope)
    )
    seen = []
    for layout in (Layout(2, expert=2, micro_batch=2, recompute="full"), Layout(1)):
        report = run_ranks(train_steps, layout.world, layout, settings, True)[0]["reports"][0]
        rest = 0.5 * 2 * report["load_balance_loss"] + 0.1 * 2 * report["z_loss"]
        rest += 0.05 * report["head_z_loss"]
        assert report["loss"] == pytest.approx(report["cross_entropy"] + rest, rel=RTOL)
        seen.append(report["load_balance_loss"])
    if scope == "micro_batch":  # depends on how the batch is cut, as its name says
        assert seen[0] != pytest.approx(seen[1], rel=100 * RTOL)
    else:
        assert seen[0] == pytest.approx(seen[1], rel=RTOL)


@pytest.mark.trap(3, 4)
def test_the_first_report_equals_losses_written_out_by_hand() -> None:
    """Value of each loss against a plain one-process computation of the definitions."""
    report = run_ranks(train_steps, 4, Layout(4, expert=2), MODEL, True)[0]["reports"][0]
    model = one_process_model(MODEL)
    text = torch.randint(
        0, 64, (SEQUENCES, SEQ_LEN + 1), generator=torch.Generator().manual_seed(5)
    )
    valid = torch.ones(SEQUENCES, SEQ_LEN, dtype=torch.bool)
    valid[0], valid[3, 5:] = False, False
    router_inputs: list[torch.Tensor] = []
    for moe in model.moe_layers():
        moe.router.register_forward_pre_hook(lambda _, args: router_inputs.append(args[0]))
    logits = model(text[:, :-1])
    tokens = int(valid.sum())
    cross_entropy = torch.nn.functional.cross_entropy(logits[valid], text[:, 1:][valid])
    balance, z = [], []
    for moe, x in zip(model.moe_layers(), router_inputs, strict=True):
        scores = (x @ moe.router.weight.t())[valid.flatten()]
        chosen = torch.nn.functional.one_hot(scores.topk(2).indices, 4).sum((0, 1))
        shares = chosen / (2 * tokens)
        balance.append(4 * (shares * scores.softmax(-1).mean(0)).sum().item())
        z.append(scores.logsumexp(-1).square().mean().item())
    assert report["num_tokens"] == tokens
    assert report["cross_entropy"] == pytest.approx(cross_entropy.item(), rel=RTOL)
    assert report["load_balance_loss"] == pytest.approx(np.mean(balance), rel=RTOL)
    assert report["z_loss"] == pytest.approx(np.mean(z), rel=RTOL)
    loss = cross_entropy.item() + 0.5 * sum(balance) + 0.1 * sum(z)
    assert report["loss"] == pytest.approx(loss, rel=RTOL)
