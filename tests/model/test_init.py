"""The spread of initial weights, against the rule written out."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.model import initial_values, random_stream
from moetrain.settings import Config
from moetrain.settings.validation import validated
from tests.test_config import toy

DIM, LAYERS = 512, 8
TRUNCATED = 0.98658  # the standard deviation of a unit normal cut at three
# Of n numbers a standard deviation is known to 1 / sqrt(2 n); five times that.
NEAR = 5 / math.sqrt(2 * DIM * DIM)
INTO_RESIDUAL = [
    "attention.o_proj.weight",
    "feed_forward.down_proj.weight",
    "feed_forward.shared_experts.down_proj.weight",
    "feed_forward.experts.down",
]
OTHERS = ["attention.q_proj.weight", "feed_forward.experts.up", "feed_forward.router.weight"]


def drawn(name: str, **init: Any) -> Tensor:
    changes = {f"model__init__{key}": value for key, value in init.items()}
    settings = validated(toy(model__dim=DIM, model__num_layers=LAYERS, **changes), Config).model
    return initial_values(name, (DIM, DIM), settings=settings, seed=0, device=torch.device("cpu"))


def spread(name: str, **init: Any) -> float:
    return float(drawn(name, **init).std())


@pytest.mark.trap(33)
@pytest.mark.parametrize("name", INTO_RESIDUAL)
def test_what_writes_into_the_residual_stream_starts_smaller(name: str) -> None:
    """By sqrt(2 · layers): two of them in each layer add up (GPT-2, section 2.3)."""
    expected = TRUNCATED / math.sqrt(DIM) / math.sqrt(2 * LAYERS)
    assert spread(f"layers.0.{name}") == pytest.approx(expected, rel=NEAR)


@pytest.mark.parametrize("name", OTHERS)
def test_what_reads_from_it_keeps_the_scale_of_activations(name: str) -> None:
    expected = TRUNCATED / math.sqrt(DIM)
    assert spread(f"layers.0.{name}") == pytest.approx(expected, rel=NEAR)


@pytest.mark.parametrize("name", [*(f"layers.3.{name}" for name in INTO_RESIDUAL + OTHERS),
                                  "embedding.weight", "head.weight"])  # fmt: skip
def test_without_settings_the_bits_are_those_of_the_rule_written_out(name: str) -> None:
    std = DIM**-0.5
    if name.endswith(tuple(INTO_RESIDUAL)):
        std /= math.sqrt(2 * LAYERS)
    stream = torch.Generator().manual_seed(random_stream(0, name, None))
    expected = torch.empty(DIM, DIM)
    torch.nn.init.trunc_normal_(expected, std=std, a=-3 * std, b=3 * std, generator=stream)
    assert torch.equal(drawn(name), expected)


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("name", INTO_RESIDUAL)
def test_the_residual_scale_is_by_depth_by_layer_or_none(name: str, layer: int) -> None:
    for scale, divisor in (
        ("depth", math.sqrt(2 * LAYERS)),
        ("layer", math.sqrt(2 * (layer + 1))),
        ("none", 1.0),
    ):
        found = spread(f"layers.{layer}.{name}", std=0.02, residual_scale=scale)
        assert found == pytest.approx(TRUNCATED * 0.02 / divisor, rel=NEAR), scale
    for other in OTHERS:
        found = spread(f"layers.{layer}.{other}", std=0.02, residual_scale="layer")
        assert found == pytest.approx(TRUNCATED * 0.02, rel=NEAR)


def test_a_normal_is_cut_where_it_is_said_or_nowhere() -> None:
    name = "layers.0.attention.q_proj.weight"
    whole = drawn(name, std=0.02, truncate_at=None)
    assert float(whole.std()) == pytest.approx(0.02, rel=NEAR)
    assert float(whole.abs().max()) > 4 * 0.02  # of 262,144 numbers 17 are expected there
    cut = drawn(name, std=0.02, truncate_at=2.0)
    assert 1.99 * 0.02 < float(cut.abs().max()) <= 2 * 0.02


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("embedding.weight", "embedding_std"),
        ("head.weight", "head_std"),
        ("layers.1.feed_forward.router.weight", "router_std"),
    ],
)
def test_embedding_head_and_router_have_a_spread_of_their_own(name: str, setting: str) -> None:
    given = {"std": 0.02, "embedding_std": 0.05, "head_std": 0.06, "router_std": 0.07}
    assert spread(name, **given) == pytest.approx(TRUNCATED * given[setting], rel=NEAR)
    assert spread(name, std=0.02) == pytest.approx(TRUNCATED * 0.02, rel=NEAR)
    assert spread("layers.1.attention.k_proj.weight", **given) == spread(
        "layers.1.attention.k_proj.weight", std=0.02
    )
