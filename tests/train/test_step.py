"""One step: what it moves, and that a step whose numbers aren't finite moves nothing."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.model import LossSums
from moetrain.optim import build_optimizer
from moetrain.parallel import Gradients
from moetrain.settings import OptimSettings
from moetrain.train.micro_batch import MicroBatch
from moetrain.train.objective import Pretraining
from moetrain.train.state import checkpoint_tensors
from moetrain.train.step import train_step
from tests.parallel.test_parallelize import build, text
from tests.support.ranks import run_ranks


class NotANumber(Pretraining):
    """An objective whose loss is not a number."""

    def begin(self, *arguments: Any, **named: Any) -> Any:
        loss = super().begin(*arguments, **named)

        def spoiled(output: LossSums, batch: MicroBatch) -> Tensor:
            part: Tensor = loss(output, batch)
            return part * float("nan")

        return spoiled


def step_and_skip() -> list[dict[str, Any]]:
    """Returns weights, biases and state before a step, after it, and after a skipped one."""
    model, meshes = build()
    model.settings = dataclasses.replace(
        model.settings,
        router=dataclasses.replace(model.settings.router, bias_update_rate=0.01),
    )
    optimizer = build_optimizer(model.parameters(), OptimSettings(lr=0.01))
    gradients = Gradients(model.parameters(), max_norm=1.0)
    tokens = text()
    batch = MicroBatch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], valid=torch.ones(4, 16, dtype=torch.bool)
    )

    def kept() -> dict[str, Any]:
        tensors = checkpoint_tensors(model, optimizer)
        return {n: t.to_local().numpy().copy() if hasattr(t, "to_local") else t.numpy().copy()
                for n, t in tensors.items()}  # fmt: skip

    found = [kept()]
    for objective in (Pretraining(), NotANumber()):
        report = train_step(
            [batch], model=model, optimizer=optimizer, gradients=gradients, meshes=meshes,
            learning_rate=0.01, objective=objective,
        )  # fmt: skip
        assert report.skipped == isinstance(objective, NotANumber)
        found.append(kept())
    return found


@pytest.mark.trap(20, 33)
def test_a_skipped_step_moves_nothing() -> None:
    """Not a weight, not a selection bias, not the optimizer's state or its count of steps."""
    before, after, skipped = run_ranks(step_and_skip, 1)[0]
    assert after.keys() == skipped.keys()
    assert any(name.endswith("exp_avg_sq") for name in after)
    assert any(name.endswith("step") for name in after)
    biases = [name for name in after if name.endswith("router.bias")]
    assert biases
    assert all((before[name] != after[name]).any() for name in biases), "a step moves them"
    for name, values in after.items():
        assert (values == skipped[name]).all(), name
