"""The spread of initial weights, against the rule written out."""

import math

import pytest
import torch

from moetrain.model import initial_values
from moetrain.settings import Config
from moetrain.settings.validation import validated
from tests.test_config import toy

DIM, LAYERS = 512, 8
TRUNCATED = 0.98658  # the standard deviation of a unit normal cut at three


def spread(name: str) -> float:
    settings = validated(toy(model__dim=DIM, model__num_layers=LAYERS), Config).model
    values = initial_values(
        name, (DIM, DIM), settings=settings, seed=0, device=torch.device("cpu"), expert=None
    )
    return float(values.std())


@pytest.mark.trap(33)
@pytest.mark.parametrize("name", ["attention.o_proj.weight", "down_proj.weight", "experts.down"])
def test_what_writes_into_the_residual_stream_starts_smaller(name: str) -> None:
    """By sqrt(2 · layers): two of them in each layer add up (GPT-2, section 2.3)."""
    expected = TRUNCATED / math.sqrt(DIM) / math.sqrt(2 * LAYERS)
    # Of n numbers a standard deviation is known to 1 / sqrt(2 n); five times that.
    assert spread(f"layers.0.{name}") == pytest.approx(expected, rel=5 / math.sqrt(2 * DIM * DIM))


@pytest.mark.parametrize("name", ["attention.q_proj.weight", "experts.up", "router.weight"])
def test_what_reads_from_it_keeps_the_scale_of_activations(name: str) -> None:
    expected = TRUNCATED / math.sqrt(DIM)
    assert spread(f"layers.0.{name}") == pytest.approx(expected, rel=5 / math.sqrt(2 * DIM * DIM))
