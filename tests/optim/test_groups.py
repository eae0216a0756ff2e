"""Parameter groups by role: factors, frozen ones, optimizers of their own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.checkpoint.manifest import Manifest, TensorEntry
from moetrain.checks import ConfigError
from moetrain.config import check
from moetrain.model.roles import Role
from moetrain.optim import (
    allocate_state,
    build_optimizer,
    moved_by,
    set_learning_rate,
    state_names,
    state_size,
)
from moetrain.settings import Config, GroupSettings, GroupsSettings, OptimSettings
from moetrain.settings.validation import validated
from moetrain.train.changes import as_plain
from moetrain.train.preview import preview_of
from moetrain.train.resume import require_same_model
from tests.support.runs import tiny_config, tiny_values

ROLES = (Role.attention, Role.router, Role.norm, Role.head)


def weights() -> dict[nn.Parameter, Role]:
    """Returns a matrix and a vector of each role."""
    torch.manual_seed(0)
    return {nn.Parameter(torch.randn(shape)): r for r in ROLES for shape in ((3, 4), (5,))}


def stepped(settings: OptimSettings, *, rate: float, steps: int = 3) -> dict[nn.Parameter, Role]:
    """Returns the parameters after some steps with given gradients."""
    roles = weights()
    optimizer = build_optimizer(roles, settings, roles=roles)
    for step in range(steps):
        torch.manual_seed(step + 1)
        for parameter in roles:
            parameter.grad = torch.randn_like(parameter)
        set_learning_rate(optimizer, rate)
        optimizer.step()
    return roles


def test_factors_multiply_the_rate_and_the_decay_of_their_role_alone() -> None:
    groups = GroupsSettings(
        router=GroupSettings(lr_factor=0.5, weight_decay_factor=3.0),
        head=GroupSettings(lr_factor=0.0),
    )
    settings = OptimSettings(name="sgd", lr=1.0, weight_decay=0.1, groups=groups)
    found = stepped(settings, rate=0.2, steps=1)
    begun = weights()
    torch.manual_seed(1)
    for (after, role), before in zip(found.items(), begun, strict=True):
        gradient = torch.randn_like(before)
        lr = {Role.router: 0.1, Role.head: 0.0}.get(role, 0.2)
        decay = (0.3 if role is Role.router else 0.1) if before.ndim > 1 else 0.0
        expected = before - lr * (gradient + decay * before)
        torch.testing.assert_close(after.detach(), expected.detach())


def test_each_role_moves_as_its_own_optimizer_moves_it() -> None:
    """Bit for bit, and the state has each one's names."""
    mixed = OptimSettings(
        name="sgd",
        momentum=0.9,
        groups=GroupsSettings(
            router=GroupSettings(optimizer="adamw", lr_factor=0.1),
            norm=GroupSettings(optimizer="adamw"),
        ),
    )
    adamw = OptimSettings(name="adamw", groups=GroupsSettings(router=GroupSettings(lr_factor=0.1)))
    sgd = OptimSettings(name="sgd", momentum=0.9)
    ours, of_adamw, of_sgd = (stepped(s, rate=0.01) for s in (mixed, adamw, sgd))
    for (parameter, role), a, b in zip(ours.items(), of_adamw, of_sgd, strict=True):
        expected = a if role in (Role.router, Role.norm) else b
        assert torch.equal(parameter, expected), role


def test_the_state_of_several_optimizers_is_one() -> None:
    roles = weights()
    groups = GroupsSettings(
        router=GroupSettings(optimizer="adamw"), head=GroupSettings(frozen=True)
    )
    for parameter, role in roles.items():
        parameter.requires_grad_(role is not Role.head)
    settings = OptimSettings(name="sgd", momentum=0.9, groups=groups)
    optimizer = build_optimizer(roles, settings, roles=roles)
    before = [p.detach().clone() for p in roles]
    allocate_state(optimizer)
    assert all(torch.equal(p, old) for p, old in zip(roles, before, strict=True))
    for parameter, role in roles.items():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        names = {name for name, value in state.items() if isinstance(value, Tensor)}
        assert names == state_names(settings, role), role
    assert state_names(settings, Role.router) == {"step", "exp_avg", "exp_avg_sq"}
    assert state_names(settings, Role.head) == set()
    assert [state_size(settings, r) for r in ROLES] == [1.0, 2.0, 1.0, 0.0]
    optimizer.zero_grad()
    assert all(p.grad is None for p in roles)


@pytest.mark.parametrize(
    "settings",
    [
        OptimSettings(name="muon", groups=GroupsSettings(router=GroupSettings(optimizer="lion"))),
        OptimSettings(
            name="lion", groups=GroupsSettings(attention=GroupSettings(optimizer="muon"))
        ),
    ],
    ids=["muon, the router lion's", "lion, attention muon's"],
)
def test_an_optimizer_of_several_among_others_keeps_its_state_where_a_checkpoint_finds_it(
    settings: OptimSettings,
) -> None:
    """Muon brings AdamW along: for other roles, and for vectors of its own."""
    names = {
        "adamw": {"step", "exp_avg", "exp_avg_sq"}, "lion": {"momentum"}, "muon": {"momentum"},
    }  # fmt: skip
    roles = weights()
    optimizer = build_optimizer(roles, settings, roles=roles)
    allocate_state(optimizer)
    for parameter, role in roles.items():
        mover = moved_by(settings, role)
        if mover == "muon" and parameter.ndim == 1:
            mover = "adamw"
        assert mover is not None
        assert set(optimizer.state.get(parameter, {})) == names[mover], (role, parameter.shape)
        assert names[mover] <= state_names(settings, role, vectors=True), role


def test_a_resume_takes_the_state_of_vectors_that_are_another_optimizers(tmp_path: Any) -> None:
    """Attention's biases are AdamW's, where the model has them."""
    groups = {"attention": {"optimizer": "muon"}}
    config = tiny_config(tmp_path, shards="shards", optim__name="lion", optim__groups=groups)

    def resumes(*kinds: str) -> None:
        state = {f"optimizer.any.{kind}": TensorEntry(shape=(), dtype="F32") for kind in kinds}
        settings = as_plain(config)
        require_same_model(
            config,
            Manifest(
                step=4, attempt=1, state={"step": 4}, config=settings, tensors=state, files={}
            ),
        )

    adamw = ("step", "exp_avg", "exp_avg_sq")
    resumes("momentum")
    resumes("momentum", *adamw)
    for others in (adamw, ("momentum", "momentum_buffer")):
        with pytest.raises(ConfigError, match="can't use the state of that one"):
            resumes(*others)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"routers": {"lr_factor": 2.0}}, "optim.groups.routers"),
        ({"router": {"lr_factor": -1.0}}, "optim.groups.router.lr_factor"),
        ({"router": {"optimizer": "adamv"}}, "did you mean 'adamw'"),
        ({"router": {"options": {"a": 1}}}, "set this group's optimizer too"),
        (
            {r: {"frozen": True} for r in Role if r not in (Role.shared_experts, Role.dense)},
            "leaves nothing to train",
        ),
    ],
)
def test_a_wrong_group_is_named(
    tmp_path: Any, groups: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check(validated(tiny_values(tmp_path, shards="shards", optim__groups=groups), Config))
    assert message in str(raised.value)


def test_a_preview_has_a_line_for_each_group_and_memory_for_what_is_trained(tmp_path: Any) -> None:
    plain = preview_of(tiny_config(tmp_path, shards="shards"))
    assert plain.groups == ()
    groups = {"experts": {"frozen": True}, "head": {"lr_factor": 0.5, "weight_decay_factor": 2.0}}
    given = preview_of(tiny_config(tmp_path, shards="shards", optim__groups=groups))
    experts, head = 2 * 4 * 3 * 32 * 32, 257 * 32
    assert f"parameters of experts: {experts:,} parameters, frozen" in list(given.lines())
    assert (
        f"parameters of head: {head:,} parameters, adamw, learning rate x 0.5, weight decay 0.2"
    ) in list(given.lines())
    assert plain.memory.gradients - given.memory.gradients == 4 * experts
    assert plain.memory.optimizer - given.memory.optimizer == 2 * 4 * experts
