"""An upcycled model's tensors: copies, noise and fresh units with the statistics that are said."""

import re
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from moetrain.settings import ModelSettings
from moetrain.upcycle.experts import Changes, Index, Upcycled, fresh_units

HIDDEN, DIM, EXPERTS = 320, 96, 4
SETTINGS = ModelSettings(
    dim=DIM, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_hidden_dim=HIDDEN,
    num_experts=EXPERTS, top_k=2, vocab_size=31, max_seq_len=64, rope_theta=1e4,
)  # fmt: skip
LAYER = "model.layers.1.feed_forward"
MATRICES = ("gate", "up", "down")
COPIES = Changes(noise=0.0, reinitialize=0.0, seed=0)


class Dense:
    """A dense model's matrices, drawn by name; `reads` are the names that were asked for.

    Units differ in scale and in mean, so that those of a few of them are not those of all.
    """

    def __init__(self) -> None:
        self.reads: list[str] = []

    def read(self, name: str, index: Index) -> Tensor:
        self.reads.append(name)
        generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        values = torch.randn(HIDDEN, DIM, generator=generator)
        unit = torch.arange(HIDDEN).unsqueeze(1) / HIDDEN
        matrix = 0.02 * (unit + 0.5) * values + 0.01 * unit
        return (matrix.T if "down" in name else matrix)[index]

    def units(self, matrix: str) -> Tensor:
        """A layer's matrix with a row for each hidden unit [hidden, dim]."""
        read = self.read(f"{LAYER}.{matrix}_proj.weight", ())
        return read.T if matrix == "down" else read


def stacks(changes: Changes) -> dict[str, Tensor]:
    """A layer's experts [experts, hidden, dim] by matrix."""
    upcycled = Upcycled(Dense().read, settings=SETTINGS, changes=changes)
    return {matrix: upcycled.read(f"{LAYER}.experts.{matrix}", ()) for matrix in MATRICES}


def changed_units(stack: Tensor, matrix: str) -> list[list[int]]:
    """Which units of each expert are not the dense layer's, bit for bit."""
    same = (stack == Dense().units(matrix)).all(-1)
    return [(~row).nonzero().flatten().tolist() for row in same]


def test_without_changes_experts_are_copies() -> None:
    for matrix, stack in stacks(COPIES).items():
        assert stack.shape == (EXPERTS, HIDDEN, DIM)
        assert changed_units(stack, matrix) == [[]] * EXPERTS


@pytest.mark.trap(14)
def test_noise_is_normal_with_its_deviation_and_differs_everywhere() -> None:
    draws = {}
    count = HIDDEN * DIM
    for matrix, stack in stacks(replace(COPIES, noise=0.1)).items():
        dense = Dense().units(matrix)
        for expert in range(EXPERTS):
            drawn = (stack[expert] - dense) / (0.1 * dense.std(correction=0))
            draws[matrix, expert] = drawn.flatten()
            # Five standard errors of a mean, a variance and a fourth moment of normal draws.
            assert abs(drawn.mean()) < 5 * count**-0.5
            assert abs((drawn**2).mean() - 1) < 5 * (2 / count) ** 0.5
            assert abs((drawn**4).mean() - 3) < 5 * (96 / count) ** 0.5
    for one, other in combinations(draws.values(), 2):
        assert abs((one * other).mean()) < 5 * count**-0.5


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0, 0.001, 0.003])
def test_a_fraction_of_the_units_begins_anew_in_all_three_matrices(fraction: float) -> None:
    found = {
        m: changed_units(s, m) for m, s in stacks(replace(COPIES, reinitialize=fraction)).items()
    }
    assert found["gate"] == found["up"] == found["down"]
    assert [len(units) for units in found["gate"]] == [round(fraction * HIDDEN)] * EXPERTS
    if fraction in (0.25, 0.5):
        assert len({tuple(units) for units in found["gate"]}) == EXPERTS


def test_fresh_units_are_normal_as_those_they_take_the_place_of() -> None:
    changes = replace(COPIES, reinitialize=0.25)
    draws = []
    for matrix, stack in stacks(changes).items():
        for expert, units in enumerate(changed_units(stack, matrix)):
            before, fresh = Dense().units(matrix)[units], stack[expert][units]
            drawn = (fresh - before.mean()) / before.std(correction=0)
            assert abs(drawn.mean()) < 5 * drawn.numel() ** -0.5
            assert abs((drawn**2).mean() - 1) < 5 * (2 / drawn.numel()) ** 0.5
            assert abs((drawn**4).mean() - 3) < 5 * (96 / drawn.numel()) ** 0.5
            draws.append(drawn.flatten())
            # Not the old values in another order or another scale.
            rest = (before - before.mean()) / before.std(correction=0)
            assert abs((drawn * rest).mean()) < 5 * drawn.numel() ** -0.5
    for one, other in combinations(draws, 2):
        assert abs((one * other).mean()) < 5 * one.numel() ** -0.5


def test_units_are_drawn_evenly() -> None:
    counts = torch.zeros(20)
    for stream in range(2000):
        counts[fresh_units(20, fraction=0.3, stream=stream)] += 1
    # A unit is drawn with probability 0.3 each time; five standard deviations of that.
    assert (counts - 600).abs().max() < 5 * (2000 * 0.3 * 0.7) ** 0.5


def test_values_are_a_function_of_seed_name_and_expert_alone() -> None:
    changes = Changes(noise=0.05, reinitialize=0.3, seed=3)
    whole = stacks(changes)
    upcycled = Upcycled(Dense().read, settings=replace(SETTINGS, top_k=1), changes=changes)
    for expert in (2, 0, 3):
        for matrix in reversed(MATRICES):
            name = f"{LAYER}.experts.{matrix}"
            part = upcycled.read(name, (slice(expert, expert + 1),))
            assert torch.equal(part, whole[matrix][expert : expert + 1])
            rows = upcycled.read(name, (slice(expert, expert + 1), slice(5, 9)))
            assert torch.equal(rows, whole[matrix][expert : expert + 1, 5:9])
    for other in (replace(changes, seed=4),):
        for matrix, stack in stacks(other).items():
            assert not (stack == whole[matrix]).all(-1).all(-1).any()


def test_experts_asked_for_one_by_one_read_a_dense_matrix_once() -> None:
    dense = Dense()
    upcycled = Upcycled(dense.read, settings=SETTINGS, changes=replace(COPIES, noise=0.1))
    for matrix in MATRICES:
        for expert in range(EXPERTS):
            upcycled.read(f"{LAYER}.experts.{matrix}", (slice(expert, expert + 1),))
    assert dense.reads == [f"{LAYER}.{matrix}_proj.weight" for matrix in MATRICES]


def test_routers_are_fresh_and_the_rest_is_the_dense_models() -> None:
    dense = Dense()
    upcycled = Upcycled(dense.read, settings=SETTINGS, changes=COPIES)
    routers = [
        upcycled.read(f"model.layers.{layer}.feed_forward.router.weight", ()) for layer in range(2)
    ]
    for router in routers:
        assert router.shape == (EXPERTS, DIM)
        # Cut at three deviations of 1/sqrt(dim): 0.986 of a normal's deviation is left.
        assert router.std() == pytest.approx(
            0.986 * DIM**-0.5, rel=5 * (2 * router.numel()) ** -0.5
        )
    assert not torch.equal(*routers)
    bias = upcycled.read("model.layers.0.feed_forward.router.bias", ())
    assert torch.equal(bias, torch.zeros(EXPERTS))
    assert not dense.reads
    name = "model.layers.0.attention.q_proj.weight"
    assert torch.equal(upcycled.read(name, (slice(2, 5),)), dense.read(name, (slice(2, 5),)))
    assert not any(re.search("router|experts", read) for read in dense.reads)
