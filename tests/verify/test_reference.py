"""The float64 reference: against torch where torch has the same thing, and what it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data_pipeline import Batch
from moetrain.model import Transformer
from moetrain.optim import build_optimizer, learning_rate
from moetrain.parallel import Gradients, build_meshes, parallelize, plain_name, resolve_topology
from moetrain.settings import Config, OptimSettings, ParallelSettings, ScheduleSettings
from moetrain.settings.validation import validated
from moetrain.train.micro_batch import MicroBatch, noise_seeds
from moetrain.train.step import train_step
from moetrain.verify.reference import scope
from moetrain.verify.reference.optimizers import Optimizer, rate
from moetrain.verify.reference.scope import unknown_settings
from moetrain.verify.reference.training import Reference
from moetrain.verify.tolerance import tolerances
from tests.support.ranks import run_ranks
from tests.support.tensors import sharded
from tests.test_config import toy

CPU = torch.device("cpu")
SMALL = {
    "model__dim": 16, "model__num_layers": 2, "model__num_heads": 2, "model__num_kv_heads": 1,
    "model__head_dim": 8, "model__ffn_hidden_dim": 12, "model__num_experts": 4,
    "model__vocab_size": 32, "train__global_batch_size": 4, "train__seq_len": 12,
}  # fmt: skip


def config(**changes: Any) -> Config:
    return validated(toy(**{**SMALL, **changes}), Config)


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("restart_from", [None, 7])
def test_its_rates_are_those_of_training_at_every_step(name: str, restart_from: int | None) -> None:
    settings = ScheduleSettings(
        name=name, warmup_steps=5, final_lr_ratio=0.2, restart_from=restart_from
    )
    for step in range(restart_from or 0, 40):
        theirs = learning_rate(step, peak=0.5, num_steps=40, settings=settings)
        assert rate(step, peak=0.5, num_steps=40, settings=settings) == pytest.approx(
            theirs, rel=1e-12
        )


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_its_optimizers_are_torchs_in_float64(name: str) -> None:
    torch.manual_seed(0)
    settings = OptimSettings(name=name, betas=(0.8, 0.9), eps=1e-3, momentum=0.7, weight_decay=0.3)
    ours = {"matrix": torch.randn(3, 4).double(), "norm": torch.randn(4).double()}
    theirs = {n: nn.Parameter(w.clone()) for n, w in ours.items()}
    groups = [{"params": [w], "weight_decay": 0.3 if w.ndim > 1 else 0.0} for w in theirs.values()]
    made: Any = (
        torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-3)
        if name == "adamw"
        else torch.optim.SGD(groups, momentum=0.7)
    )
    optimizer = Optimizer(settings)
    for step in range(4):
        lr = 0.1 / (step + 1)
        gradients = {n: torch.randn(w.shape).double() for n, w in ours.items()}
        optimizer.step(ours, gradients, lr)
        for group in made.param_groups:
            group["lr"] = lr
        for parameter_name, parameter in theirs.items():
            parameter.grad = gradients[parameter_name].clone()
        made.step()
    for weight_name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[weight_name].detach(), rtol=1e-12, atol=1e-14)


def test_what_it_cannot_compute_is_named_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown_settings(config()) == []
    assert unknown_settings(config(model__qk_norm=True, optim__momentum=0.9)) == []
    forced = unknown_settings(config(model__router__force_balance=True))
    assert forced == ["model.router.force_balance=True"]
    monkeypatch.setattr(scope, "INIT", scope.INIT - {"std"})
    assert unknown_settings(config(model__init__std=0.02)) == ["model.init.std=0.02"]
    # A setting of the model that came after the reference was written.
    monkeypatch.setattr(scope, "MODEL", scope.MODEL - {"clip_qkv"})
    assert unknown_settings(config(model__clip_qkv=2.0)) == ["model.clip_qkv=2.0"]


def batch() -> Batch:
    """Returns four sequences with padding and documents."""
    generator = np.random.default_rng(0)
    text = generator.integers(0, 32, (4, 13))
    starts = generator.random((4, 12)) < 0.3
    return Batch(
        tokens=text[:, :-1].copy(), targets=text[:, 1:].copy(),
        loss_mask=np.arange(12) < np.array([12, 7, 10, 1])[:, None],
        document_starts=starts, sources=np.zeros(4, dtype=np.int64),
    )  # fmt: skip


def trained(given: Config) -> dict[str, Any]:
    """Returns figures and weights of two steps of training, on one rank and in two parts."""
    topology = resolve_topology(
        ParallelSettings(), world_size=1, num_experts=given.model.num_experts,
        ffn_hidden_dim=given.model.ffn_hidden_dim, ranks_per_node=1,
    )  # fmt: skip
    meshes = build_meshes(topology, device=CPU)
    with torch.device("meta"):
        model = Transformer(given.model)
    model = parallelize(
        model, meshes, ParallelSettings(), seed=given.seed, device=CPU,
        compute_dtype=torch.float32,
    )  # fmt: skip
    optimizer = build_optimizer(model.parameters(), given.optim)
    gradients = Gradients(model.parameters(), max_norm=given.optim.clip_grad_norm)
    figures = []
    for step in range(2):
        seeds = noise_seeds(given, range(4 * step, 4 * step + 4))
        parts = MicroBatch.cut(batch(), 2, device=CPU, mask_documents=True, noise_seeds=seeds)
        report = train_step(
            parts, model=model, optimizer=optimizer, gradients=gradients, meshes=meshes,
            learning_rate=0.1,
        )  # fmt: skip
        names = ("loss", "cross_entropy", "load_balance_loss", "z_loss", "entropy", "grad_norm")
        figures.append({name: getattr(report, name) for name in names})
        if report.head_z_loss is not None:
            figures[-1]["head_z_loss"] = report.head_z_loss
    weights = {plain_name(n): sharded(p).full_tensor() for n, p in model.named_parameters()}
    weights |= {n: b for n, b in model.named_buffers()}
    return {"figures": figures, "weights": {n: w.detach().numpy() for n, w in weights.items()}}


DEEPSEEK = {
    "model__num_layers": 3, "model__num_experts": 8, "model__top_k": 3, "model__qk_norm": True,
    "model__num_shared_experts": 1, "model__num_dense_layers": 1,
    "model__dense_ffn_hidden_dim": 20, "model__router__score_function": "sigmoid",
    "model__router__num_groups": 4, "model__router__top_groups": 2,
    "model__router__routed_scaling_factor": 2.0,
}  # fmt: skip


GLM = {
    "model__qk_norm": True, "model__qk_norm_scope": "head", "model__clip_qkv": 1.0,
    "model__attention_output_bias": True,
    "model__attention_bias": True, "model__partial_rotary_factor": 0.5,
    "model__tie_embeddings": True, "model__rope_scaling__type": "yarn",
    "model__rope_scaling__factor": 4.0, "model__rope_scaling__original_max_seq_len": 8,
    "model__logit_soft_cap": 2.0, "model__head_z_loss_weight": 0.1,
    "model__init__std": 0.2, "model__init__truncate_at": None, "model__init__router_std": 0.4,
    "model__init__residual_scale": "layer", "model__init__embedding_std": 0.3,
}  # fmt: skip
LLAMA = {
    "model__init__head_std": 0.1, "model__init__residual_scale": "none",
    "model__rope_scaling__type": "llama3", "model__rope_scaling__factor": 8.0,
    "model__rope_scaling__original_max_seq_len": 8,
}  # fmt: skip


@pytest.mark.trap(3, 12, 33)
@pytest.mark.parametrize(
    "changes",
    [
        {"model__router__load_balance_scope": "global_batch"},
        {
            "model__router__load_balance_scope": "micro_batch",
            "model__router__normalize_gates": False,
        },
        {"model__router__load_balance_scope": "sequence", **DEEPSEEK},
        GLM,
        LLAMA,
    ],
    ids=["global_batch", "micro_batch", "sequence, as in DeepSeek", "all of attention", "llama3"],
)
def test_a_step_of_training_equals_it_within_float32(changes: dict[str, Any]) -> None:
    given = config(
        **changes,
        model__router__jitter_noise=0.1,
        model__router__z_loss_weight=0.05,
        model__router__load_balance_loss_weight=0.2,
        model__router__bias_update_rate=0.01,
        optim__name="sgd",
        optim__weight_decay=0.1,
    )
    limits = tolerances(given.model, seq_len=12, num_tokens=48)
    found = run_ranks(trained, 1, given)[0]
    reference = Reference(given.model, given.optim, seed=given.seed, mask_documents=True)
    for step, figures in enumerate(found["figures"]):
        exact = reference.step(batch(), first_sample=4 * step, lr=0.1, micro_batch_size=2)
        expected = exact.figures | {"grad_norm": torch.tensor(exact.gradient_norm)}
        for name, value in figures.items():
            limit = limits.gradient if name == "grad_norm" else limits.forward
            assert value == pytest.approx(float(expected[name]), rel=limit * (step + 1)), name
    for name, weight in (reference.weights | reference.biases).items():
        # Each step is clipped to a norm of 1, times a rate of 0.1, and rounds the weights.
        size = float(weight.norm())
        allowed = 2 * (limits.gradient * 0.1 + torch.finfo(torch.float32).eps * size)
        off = float((torch.from_numpy(found["weights"][name]).double() - weight).norm())
        assert off <= allowed, name
