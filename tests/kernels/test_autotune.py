"""The timing of backends, with real work; only the clock is counted."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moetrain.kernels import Assignments, expert_swiglu, refuses
from moetrain.kernels.autotune import ExpertShape, measure, seconds_of_backends

SHAPE = ExpertShape(
    rows=24,
    choices=2,
    exchanged=False,
    dim=16,
    hidden=32,
    experts=4,
    dtype=torch.float32,
    device=torch.device("cpu"),
)


class Work:
    """Candidates that move a clock of their own, and count how often they were called."""

    def __init__(self, **seconds: float) -> None:
        self.now = 0.0
        self.calls = dict.fromkeys(seconds, 0)
        self.candidates = {name: self.candidate(name, took) for name, took in seconds.items()}

    def candidate(self, name: str, took: float) -> Callable[[], None]:
        def call() -> None:
            self.calls[name] += 1
            # The first call compiles: the slowest of all, whoever is the fastest later.
            self.now += took if self.calls[name] > 1 else 100 / took

        return call

    def clock(self) -> float:
        return self.now


def test_medians_are_measured_and_the_warm_up_does_not_count() -> None:
    work = Work(slow=2.0, quick=1.0)
    assert measure(work.candidates, clock=work.clock) == {"slow": 2.0, "quick": 1.0}


def test_real_work_on_the_real_clock() -> None:
    seconds = measure({"slow": lambda: time.sleep(0.05), "quick": lambda: time.sleep(0.001)})
    assert seconds["quick"] < seconds["slow"]


def test_one_that_raises_is_left_out_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ValueError("rows of 3 bytes")

    work = Work(a=1.0)
    with caplog.at_level(logging.WARNING):
        seconds = measure({"broken": broken, **work.candidates}, clock=work.clock)
    assert seconds == {"a": 1.0}
    assert "backend broken is left out: ValueError: rows of 3 bytes" in caplog.text
    with pytest.raises(RuntimeError, match="broken: ValueError: rows of 3 bytes"):
        measure({"broken": broken})


def test_running_out_of_memory_is_raised() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        measure({"a": full, "b": lambda: None})


def test_choices_are_for_assignments_up_to_the_next_power_of_two() -> None:
    keys = [replace(SHAPE, rows=rows, choices=1).key for rows in (1000, 1024, 1025, 0)]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0].endswith("float32, dim 16, hidden 32, experts 4, assignments 1024")
    assert keys[3].endswith("assignments 1")


@pytest.mark.parametrize("exchanged", [False, True])
def test_every_expert_of_a_problem_has_the_same_load(exchanged: bool) -> None:
    shape = replace(SHAPE, exchanged=exchanged)
    state = torch.get_rng_state()
    x, gates, assignments, *weights = shape.problem()
    assert torch.equal(torch.get_rng_state(), state)
    assert assignments.counts.tolist() == [12] * 4
    assert (assignments.per_row is None) == exchanged
    outline = shape.outline()
    assert [t.shape for t in (x, *weights)] == [t.shape for t in (outline[0], *outline[2:])]
    assert assignments.row.shape == outline[1].row.shape
    expected = expert_swiglu(x, gates, assignments, *weights, backend="cpu")
    out = expert_swiglu(x, gates, assignments, *weights, backend="grouped_mm")
    assert expected.abs().max() > 1
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_real_backends_are_timed_and_those_that_refuse_are_known_from_an_outline() -> None:
    assert refuses("grouped_mm", *SHAPE.outline()) is None
    assert "whole 16 bytes" in str(refuses("grouped_mm", *replace(SHAPE, dim=18).outline()))

    def backend(name: str) -> Callable[..., Tensor]:
        return lambda *tensors: expert_swiglu(*tensors, backend=name)

    seconds = seconds_of_backends(SHAPE, {name: backend(name) for name in ("cpu", "grouped_mm")})
    assert set(seconds) == {"cpu", "grouped_mm"}
    assert all(0 < taken < 10 for taken in seconds.values())


def test_forward_and_backward_are_measured() -> None:
    """The forward alone would choose the wrong one; it works where gradients are off, too."""

    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            time.sleep(0.05)
            return grad

    def slow(x: Tensor, gates: Tensor, assignments: Assignments, *weights: Tensor) -> Tensor:
        total = gates.sum() + sum(weight.sum() for weight in weights)
        apply: Callable[..., Tensor] = SlowBackward.apply
        return apply(x * total)

    def quick(x: Tensor, gates: Tensor, assignments: Assignments, *weights: Tensor) -> Tensor:
        time.sleep(0.01)
        return x * (gates.sum() + sum(weight.sum() for weight in weights))

    with torch.no_grad():
        seconds = seconds_of_backends(SHAPE, {"slow": slow, "quick": quick})
    assert seconds["quick"] < 0.05 <= seconds["slow"]


@pytest.mark.parametrize(("preferred", "dim", "serves"), [
    (None, 16, "cpu"), ("cpu", 16, "cpu"), ("grouped_mm", 16, "grouped_mm"),
    ("grouped_mm", 18, "cpu"),
])  # fmt: skip
def test_auto_takes_the_preferred_backend_unless_it_refuses_the_shape(
    preferred: str | None, dim: int, serves: str
) -> None:
    x, gates, assignments, *weights = replace(SHAPE, dim=dim).problem()
    x.requires_grad_()

    def how(backend: str, preferred: str | None = None) -> str:
        out = expert_swiglu(x, gates, assignments, *weights, backend=backend, preferred=preferred)
        made_by = out.grad_fn
        assert made_by is not None
        return made_by.name()

    assert how("auto", preferred) == how(serves)
    if dim == 16:
        assert how("cpu") != how("grouped_mm"), "else this can't tell them apart"
