"""A backend's answer to a small layer, against float64; experts with nothing take part."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.kernels import Assignments, expert_swiglu, known_answer
from moetrain.kernels.known_answer import answer_of


@pytest.mark.parametrize("backend", ["cpu", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_answer_rightly(backend: str, dtype: torch.dtype) -> None:
    answer = answer_of(backend, device="cpu", dtype=dtype)
    assert answer.reason is None
    assert answer.error is not None
    assert 0 < answer.error <= answer.tolerance


@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_a_gradient_that_is_not_written_for_empty_experts_is_seen(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaves_out(
        x: Tensor, gates: Tensor, assignments: Assignments, *weights: Any, **_: Any
    ) -> Any:
        nothing = (assignments.counts == 0)[:, None, None]
        gate = weights[0] * 1
        gate.register_hook(lambda grad: grad.masked_fill(nothing, value))
        return expert_swiglu(x, gates, assignments, gate, *weights[1:], backend="cpu")

    monkeypatch.setattr(known_answer, "expert_swiglu", leaves_out)
    reason = answer_of("grouped_mm", device="cpu", dtype=torch.float32).reason
    assert reason is not None
    assert "its results are wrong" in reason
