"""Schedules as curves, and the optimizer's groups and state."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from moetrain.optim import allocate_state, build_optimizer, learning_rate, state_names
from moetrain.settings import OptimSettings, ScheduleSettings


def curve(num_steps: int = 1000, **settings: Any) -> list[float]:
    schedule = ScheduleSettings(**settings)
    return [
        learning_rate(step, peak=2.0, num_steps=num_steps, settings=schedule)
        for step in range(num_steps)
    ]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(name: str) -> None:
    rates = curve(name=name, warmup_steps=100)
    assert rates[:3] == pytest.approx([0.02, 0.04, 0.06])
    assert rates[99] == pytest.approx(2.0)
    assert max(rates) <= 2.0


def test_cosine_falls_to_its_last_ratio() -> None:
    rates = curve(name="cosine", warmup_steps=100, final_lr_ratio=0.1)
    assert rates[550] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5), rel=1e-9)
    assert rates[-1] == 2.0 * 0.1
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_wsd_is_flat_and_then_falls_in_a_line() -> None:
    rates = curve(name="wsd", warmup_steps=100, final_lr_ratio=0.0, decay_fraction=0.2)
    assert set(rates[100:800]) == {2.0}
    assert rates[800] == pytest.approx(1.99)
    assert rates[899] == pytest.approx(1.0)
    assert rates[999] == 0.0


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (2, 0), (2, 1), (7, 3), (1000, 100)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 1.0])
def test_the_last_step_has_exactly_the_last_ratio_and_the_warm_up_ends_at_the_peak(
    name: str, num_steps: int, warmup: int, ratio: float
) -> None:
    rates = curve(num_steps, name=name, warmup_steps=warmup, final_lr_ratio=ratio)
    assert rates[-1] == 2.0 * ratio
    if warmup:
        assert rates[warmup - 1] == 2.0
    if num_steps > warmup + 1:
        assert rates[warmup] == 2.0
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_wsd_without_a_decay_stays() -> None:
    assert set(curve(10, name="wsd", warmup_steps=0, decay_fraction=0.0)) == {2.0}
    assert curve(10, name="wsd", warmup_steps=0, decay_fraction=0.01)[-2:] == [2.0, 2.0 * 0.1]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_a_schedule_restarted_is_a_new_one_counted_from_its_step(name: str) -> None:
    settings = {"name": name, "warmup_steps": 5, "final_lr_ratio": 0.25}
    restarted = curve(140, **settings, restart_from=100)
    assert restarted[100:] == curve(40, **settings)


def test_what_an_optimizer_keeps_is_known_without_its_parameters() -> None:
    assert state_names(OptimSettings(name="adamw")) == {"step", "exp_avg", "exp_avg_sq"}
    assert state_names(OptimSettings(name="sgd", momentum=0.9)) == {"momentum_buffer"}
    assert state_names(OptimSettings(name="sgd")) == set()


def test_a_longer_run_keeps_the_wsd_rates_of_the_stable_part() -> None:
    short, long = (curve(n, name="wsd", warmup_steps=10) for n in (100, 200))
    assert short[:80] == long[:80]


def test_one_adamw_step_equals_the_formula_and_vectors_do_not_decay() -> None:
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
    before = matrix.detach().clone(), vector.detach().clone()
    settings = OptimSettings(name="adamw", lr=0.01, weight_decay=0.5, eps=1e-8)
    optimizer = build_optimizer([matrix, vector], settings)
    matrix.grad, vector.grad = torch.randn(3, 4), torch.randn(4)
    optimizer.step()
    # The first step of Adam is lr * sign(gradient), up to eps.
    torch.testing.assert_close(
        matrix.detach(), before[0] * (1 - 0.01 * 0.5) - 0.01 * matrix.grad.sign()
    )
    torch.testing.assert_close(vector.detach(), before[1] - 0.01 * vector.grad.sign())


@pytest.mark.parametrize("settings", [
    OptimSettings(name="adamw", lr=0.1), OptimSettings(name="sgd", lr=0.1, momentum=0.9),
])  # fmt: skip
def test_allocating_state_changes_no_weight_and_makes_every_tensor(
    settings: OptimSettings,
) -> None:
    weights = [nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(5))]
    before = [w.detach().clone() for w in weights]
    optimizer = build_optimizer(weights, settings)
    allocate_state(optimizer)
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight, old)
        assert weight.grad is None
        assert optimizer.state[weight]
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_a_rate_that_is_not_finite_cannot_come_out_of_a_schedule() -> None:
    for name in ("cosine", "wsd", "constant"):
        assert all(math.isfinite(r) for r in curve(1, name=name, warmup_steps=0))


EPS = torch.finfo(torch.float32).eps


@pytest.mark.trap(33)
def test_adamw_equals_the_formula_over_three_steps() -> None:
    """Algorithm 2 of arXiv 1711.05101, on a matrix, on stacked experts and on a norm's vector."""
    torch.manual_seed(0)
    settings = OptimSettings(lr=0.01, weight_decay=0.5, betas=(0.8, 0.6), eps=1e-3)
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (2, 3, 4), (4,))]
    optimizer = build_optimizer(weights, settings)
    expected = [w.detach().double() for w in weights]
    m, v = ([torch.zeros_like(w) for w in expected] for _ in range(2))
    for step in (1, 2, 3):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape)
            g = weight.grad.double()
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.6 * v[i] + 0.4 * g**2
            update = m[i] / (1 - 0.8**step) / ((v[i] / (1 - 0.6**step)).sqrt() + 1e-3)
            decay = 0.0 if weight.ndim == 1 else 0.5
            expected[i] = expected[i] - 0.01 * (update + decay * expected[i])
        optimizer.step()
    for weight, exact in zip(weights, expected, strict=True):
        # Three steps of two roundings of the weight, and ten roundings of an update of about 0.01.
        allowed = 3 * (2 * EPS * float(exact.abs().max()) + 10 * EPS * 0.02)
        assert (weight.detach().double() - exact).abs().max() < allowed


@pytest.mark.trap(33)
def test_sgd_with_momentum_equals_the_formula_over_three_steps() -> None:
    torch.manual_seed(0)
    settings = OptimSettings(name="sgd", lr=0.1, weight_decay=0.5, momentum=0.9)
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (2, 3, 4), (4,))]
    optimizer = build_optimizer(weights, settings)
    expected = [w.detach().double() for w in weights]
    sums = [torch.zeros_like(w) for w in expected]
    for _ in range(3):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape)
            decay = 0.0 if weight.ndim == 1 else 0.5
            sums[i] = 0.9 * sums[i] + weight.grad.double() + decay * expected[i]
            expected[i] = expected[i] - 0.1 * sums[i]
        optimizer.step()
    for weight, exact, moved in zip(weights, expected, sums, strict=True):
        # Three steps, each of two roundings of the weight and four of the buffer.
        largest = float(exact.abs().max()) + float(moved.abs().max())
        assert (weight.detach().double() - exact).abs().max() < 3 * 4 * EPS * largest
