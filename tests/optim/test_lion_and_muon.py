"""Lion and Muon against their papers' formulas, and sharded against whole."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moetrain.model.roles import Role, roles_of
from moetrain.optim import build_optimizer, moved_by, set_learning_rate, state_size
from moetrain.optim.muon import MuonOptions, orthogonalised
from moetrain.settings import GroupSettings, GroupsSettings, OptimSettings
from moetrain.train.preview import preview_of
from tests.support.ranks import run_ranks
from tests.support.runs import tiny_config

SHAPES: dict[str, tuple[tuple[int, ...], Role]] = {
    "q_proj": ((12, 20), Role.attention),
    "bias": ((12,), Role.attention),
    "tall": ((21, 8), Role.dense),
    "experts": ((4, 6, 10), Role.experts),
    "router": ((4, 20), Role.router),
    "embedding": ((30, 20), Role.embedding),
}
STEPS, RATE = 3, 0.05


def random(salt: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(salt)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) * (0.01 if salt else 1.0)
        for name, (shape, _) in SHAPES.items()
    }


def trained(parameters: dict[str, nn.Parameter], settings: OptimSettings) -> None:
    """Takes some steps with given gradients, distributed as the parameters are."""
    roles = {p: SHAPES[name][1] for name, p in parameters.items()}
    optimizer = build_optimizer(parameters.values(), settings, roles=roles)
    for step in range(STEPS):
        gradients = random(step + 1)
        for name, parameter in parameters.items():
            gradient = gradients[name].to(parameter.dtype)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        set_learning_rate(optimizer, RATE)
        optimizer.step()


def one_process(settings: OptimSettings) -> dict[str, Tensor]:
    parameters = {name: nn.Parameter(value) for name, value in random(0).items()}
    trained(parameters, settings)
    return {name: p.detach() for name, p in parameters.items()}


def decay(name: str, settings: OptimSettings) -> float:
    return settings.weight_decay if len(SHAPES[name][0]) > 1 else 0.0


def test_lion_is_its_formula() -> None:
    settings = OptimSettings(name="lion", lr=1.0, weight_decay=0.2, betas=(0.9, 0.99))
    found = one_process(settings)
    for name, weight in random(0, torch.float64).items():
        momentum = torch.zeros_like(weight)
        for step in range(STEPS):
            gradient = random(step + 1, torch.float64)[name]
            update = (0.9 * momentum + 0.1 * gradient).sign()
            weight -= RATE * (update + decay(name, settings) * weight)
            momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-5, atol=1e-6)


def newton_schulz(matrix: Tensor) -> Tensor:
    """One matrix, [rows, columns], as the paper's pseudocode has it."""
    x: Tensor = matrix / matrix.norm()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def test_muon_is_its_formula_on_each_matrix_and_adamw_is_the_rest() -> None:
    settings = OptimSettings(name="muon", lr=1.0, weight_decay=0.2)
    found = one_process(settings)
    adamw = one_process(OptimSettings(name="adamw", lr=1.0, weight_decay=0.2))
    for name, weight in random(0, torch.float64).items():
        if name in ("bias", "router", "embedding"):
            assert torch.equal(found[name], adamw[name]), name
            continue
        momentum = torch.zeros_like(weight)
        for step in range(STEPS):
            gradient = random(step + 1, torch.float64)[name]
            momentum = 0.95 * momentum + 0.05 * gradient
            ahead = 0.05 * gradient + 0.95 * momentum
            each = ahead if weight.ndim == 3 else ahead.unsqueeze(0)
            update = torch.stack([newton_schulz(m) for m in each]).view_as(weight)
            scale = 0.2 * math.sqrt(max(weight.shape[-2:]))
            weight -= RATE * (scale * update + 0.2 * weight)
        # An iteration multiplies small singular values, and their rounding, by up to 3.4445.
        bound = 3.4445**5 * 2**-23
        assert (found[name] - weight).norm() <= bound * weight.norm(), name


@pytest.mark.parametrize(
    "options",
    [{"momentum": 1.0}, {"momentum": -0.1}, {"iterations": 0}, {"iterations": 100}],
)
def test_options_with_which_muon_is_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        OptimSettings(name="muon", options=options)


def test_muon_is_torchs_within_bfloat16() -> None:
    """torch.optim.Muon iterates in bfloat16, and takes single matrices only."""
    torch.manual_seed(0)
    matrix, gradient = torch.randn(16, 24), torch.randn(16, 24)
    theirs = nn.Parameter(matrix.clone())
    reference = torch.optim.Muon(
        [theirs], lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    theirs.grad = gradient
    reference.step()
    ours = nn.Parameter(matrix.clone())
    optimizer = build_optimizer([ours], OptimSettings(name="muon", weight_decay=0.1))
    ours.grad = gradient.clone()
    set_learning_rate(optimizer, RATE)
    optimizer.step()
    moved, expected = ours.detach() - matrix, theirs.detach() - matrix
    # Fifteen products with a relative error of 2**-8 each, if they all add up.
    assert (moved - expected).norm() <= 15 * 2**-8 * expected.norm()
    singular = torch.linalg.svdvals(orthogonalised(gradient, MuonOptions()))
    assert 0.6 < singular.min() < singular.max() < 1.3


PLACEMENTS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    # As FSDP shards: rows of dense weights over all ranks, unevenly; experts over the expert axis
    # and their rows over what is left; and with replicas.
    "sharded": ((2, 2), {"dense": [Shard(0), Shard(0)], "experts": [Shard(1), Shard(0)]}),
    "replicated": ((2, 2), {"dense": [Replicate(), Shard(0)], "experts": [Replicate(), Shard(0)]}),
    "experts by rows": ((1, 4), {"dense": [Replicate(), Shard(0)],
                                 "experts": [Replicate(), Shard(1)]}),
}  # fmt: skip


def sharded(names: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns each optimizer's weights after training, by placement, gathered."""
    found = {}
    for name in names:
        for case, (shape, placements) in PLACEMENTS.items():
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b"))
            parameters = {
                key: nn.Parameter(
                    distribute_tensor(
                        value, mesh, placements["experts" if value.ndim == 3 else "dense"]
                    )
                )
                for key, value in random(0).items()
            }
            trained(parameters, OptimSettings(name=name, lr=1.0, weight_decay=0.2))
            whole = {}
            for key, parameter in parameters.items():
                assert isinstance(parameter, DTensor)
                whole[key] = parameter.full_tensor().detach().numpy()
            found[name, case] = whole
    return found


@pytest.mark.trap(1)
def test_sharded_matrices_move_as_whole_ones() -> None:
    """On four ranks; all elements of a matrix take part in its update."""
    names = ["lion", "muon"]
    first, *others = run_ranks(sharded, 4, names)
    for name in names:
        expected = one_process(OptimSettings(name=name, lr=1.0, weight_decay=0.2))
        for case in PLACEMENTS:
            for key, weight in first[name, case].items():
                torch.testing.assert_close(
                    torch.from_numpy(weight), expected[key], msg=f"{case} {key}"
                )
                for other in others:
                    assert (other[name, case][key] == weight).all(), "ranks agree to the bit"


def test_who_moves_what_is_known_and_counted(tmp_path: Any) -> None:
    config = tiny_config(tmp_path, shards="shards", optim__name="muon")
    by = {role: moved_by(config.optim, role) for role in roles_of(config.model)}
    assert by == {
        Role.embedding: "adamw", Role.head: "adamw", Role.norm: "adamw", Role.router: "adamw",
        Role.attention: "muon", Role.experts: "muon",
    }  # fmt: skip
    assert state_size(config.optim, Role.experts) == 1.0
    assert state_size(config.optim, Role.embedding) == 2.0
    own = OptimSettings(groups=GroupsSettings(experts=GroupSettings(optimizer="muon")))
    assert (moved_by(own, Role.experts), moved_by(own, Role.attention)) == ("muon", "adamw")
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 4 * 3 * 32 * 32)
    plain = preview_of(tiny_config(tmp_path, shards="shards")).memory.optimizer
    assert plain - preview_of(config).memory.optimizer == 4 * matrices
