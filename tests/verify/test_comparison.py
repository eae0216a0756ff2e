"""Layouts to try, tolerances, differences and memory: the parts of a verification without ranks."""

from dataclasses import replace
from math import inf

import pytest
import torch

from moetrain.checks import ConfigError
from moetrain.settings import Config, OptimSettings
from moetrain.settings.validation import validated
from moetrain.verify import passes
from moetrain.verify.comparison import Difference, difference, kind_of, parts, worst
from moetrain.verify.layouts import EXCHANGES, REFERENCE, Layout, layouts_for
from moetrain.verify.memory import needed_gib, reference_gib, require_memory
from moetrain.verify.settings import VerifySettings
from moetrain.verify.tolerance import EPS, AdamErrors, tolerances
from tests.test_config import compose_preset, toy


def config(**changes: object) -> Config:
    return validated(toy(**changes), Config)


def test_all_degrees_of_four_ranks_are_tried_and_each_once() -> None:
    layouts, left_out = layouts_for(config(), num_ranks=4)
    assert layouts[0] == REFERENCE
    assert len(set(layouts)) == len(layouts)
    assert left_out == []
    of_four = {
        (la.expert_degree, la.data_replicate_degree)
        for la in layouts
        if la.num_ranks == 4 and la.num_micro_batches == 1
    }
    assert {la.exchange for la in layouts} == {None, *EXCHANGES}
    assert of_four == {(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)}
    assert Layout(num_micro_batches=4) in layouts
    assert Layout(recompute="full") in layouts
    assert Layout(num_ranks=4, expert_degree=2, num_micro_batches=4, recompute="full") in layouts


def test_what_a_model_cannot_have_is_left_out_with_the_reason() -> None:
    layouts, left_out = layouts_for(config(model__num_experts=6), num_ranks=4)
    reasons = {layout: str(error) for layout, error in left_out}
    assert "does not divide the 6 experts" in reasons[Layout(num_ranks=4, expert_degree=4)]
    assert Layout(num_ranks=4, expert_degree=2) in layouts
    _, left_out = layouts_for(config(train__global_batch_size=2), num_ranks=4)
    assert all("train.global_batch_size=2" in str(error) for _, error in left_out)
    assert {la.num_ranks for la, _ in left_out if la.num_micro_batches == 1} == {4}


def test_one_rank_and_a_dense_model_have_layouts_too() -> None:
    alone, _ = layouts_for(config(), num_ranks=1)
    assert [la.num_ranks for la in alone] == [1, 1, 1]
    dense, left_out = layouts_for(config(model__num_experts=1, model__top_k=1), num_ranks=4)
    assert left_out == []
    assert {la.expert_degree for la in dense} == {1}


def test_each_expert_is_compared_by_itself_and_by_its_global_id() -> None:
    name = "layers.0.feed_forward.experts.gate"
    theirs = torch.ones(4, 3, 2)
    theirs[0] *= 1e3  # a large expert must not hide a small one's error
    ours = theirs.clone()
    ours[2] *= 2
    found = worst(
        difference(where, a, b, allowed=1e-4)
        for (where, a), (_, b) in zip(parts(name, ours), parts(name, theirs), strict=True)
    )
    assert found is not None
    assert found.where == f"{name} of expert 2"
    assert found.relative == pytest.approx(1.0)
    assert not found.passes
    swapped = theirs[[1, 0, 2, 3]]
    assert difference("", swapped[0], theirs[0], allowed=1e-4).relative > 0.9


@pytest.mark.parametrize(
    ("ours", "theirs", "relative"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),  # an expert without a token
        ([1e-9, 0.0], [0.0, 0.0], inf),  # that another layout gives one
        ([float("nan"), 1.0], [1.0, 1.0], inf),
        ([1.0, 1.0], [float("nan"), 1.0], inf),
        ([1.0], [1.0, 1.0], inf),
    ],
)
def test_nothing_against_something_and_what_is_no_number_never_pass(
    ours: list[float], theirs: list[float], relative: float
) -> None:
    found = difference("x", torch.tensor(ours), torch.tensor(theirs), allowed=0.5)
    assert found.relative == relative
    assert found.passes == (relative == 0.0)


def test_the_worst_difference_is_the_one_that_exceeds_its_own_tolerance_most() -> None:
    large = Difference(relative=0.5, allowed=1.0, where="large, but allowed")
    small = Difference(relative=1e-3, allowed=1e-4, where="small, but too much")
    assert worst([large, small]) is small
    assert worst([]) is None


def test_parameters_fall_into_their_columns() -> None:
    assert kind_of("layers.0.feed_forward.experts.down") == "experts"
    assert kind_of("layers.0.feed_forward.router.weight") == "router"
    assert kind_of("layers.0.feed_forward.gate_proj.weight") == "dense"
    assert kind_of("embedding.weight") == "dense"


def test_tolerances_grow_with_the_root_of_the_sums_and_stay_below_one_lost_token() -> None:
    model = config().model
    narrow = tolerances(model, seq_len=256, num_tokens=4096)
    longer = tolerances(model, seq_len=256, num_tokens=4 * 4096)
    assert narrow.forward == longer.forward
    assert narrow.gradient < longer.gradient < 2 * narrow.gradient
    assert narrow.gradient < 1 / 4096
    assert narrow.gradients(size=0.0, total=1.0) == narrow.gradient
    assert narrow.gradients(size=0.01, total=1.0) == narrow.gradient + 100 * EPS
    assert narrow.weights(steps=3, size=1.0, moved=0.0) == 0.0
    assert narrow.weights(steps=3, size=1.0, moved=0.0, decays=True) == 3 * EPS
    assert narrow.weights(steps=1, size=1.0, moved=0.1) == 0.1 * narrow.gradient + EPS


@pytest.mark.parametrize(
    "name", ["8x7b", "8x160m", "olmoe-1b-7b", "mistral-7b", "deepseek-moe-16b"]
)
def test_a_model_too_large_is_refused_with_overrides_that_fit(name: str) -> None:
    large = validated(compose_preset(f"model={name}"), Config)
    with pytest.raises(ConfigError, match=r"needs about [\d.,]+ [GT]iB") as refused:
        require_memory(large, num_ranks=4, available=16.0)
    overrides = str(refused.value).partition("for example with ")[2].split()
    assert overrides
    small = validated(compose_preset(f"model={name}", *overrides), Config)
    require_memory(small, num_ranks=4, available=16.0)
    layouts_for(replace(small, schedule=replace(small.schedule, warmup_steps=0)), num_ranks=4)


def test_the_estimate_counts_a_replica_for_every_rank() -> None:
    four, eight = (needed_gib(config(), num_ranks=n) for n in (4, 8))
    assert eight > four


def test_the_reference_is_left_out_where_attentions_matrix_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, long = (reference_gib(config(train__seq_len=n)) for n in (256, 1024))
    assert short < 1 < 16 * short
    assert long > short
    monkeypatch.setattr(passes, "available_gib", lambda: short / 2)
    plan = passes.plan_passes(config(), VerifySettings(num_ranks=1))
    assert plan.reference_refuses == ("train.seq_len=256",)
    (said,) = [reason for reason in plan.not_covered if "float64 reference" in reason]
    assert "of memory" in said


def test_the_passes_take_the_users_optimizer_decay_and_schedule() -> None:
    given = config(
        optim__weight_decay=0.3, optim__betas=(0.5, 0.6), schedule__name="wsd",
        schedule__warmup_steps=60,
    )  # fmt: skip
    layouts, optimizer, dtype = passes.plan_passes(given, VerifySettings(num_steps=3)).passes
    assert (layouts.config.optim.name, layouts.config.optim.weight_decay) == ("sgd", 0.3)
    assert optimizer.config.optim == given.optim
    # The middle of the warm-up, of the stable part, and of the decay over the last 120 of 600.
    assert passes.schedule_steps(given, 3) == (30, 300, 500)
    last = 0.1 + 0.9 * 99 / 120
    assert layouts.rates == pytest.approx([0.1 * share for share in (31 / 60, 1.0, last)])
    assert optimizer.rates == pytest.approx([3e-4 * share for share in (31 / 60, 1.0, last)])
    assert layouts.reference_rates == pytest.approx(layouts.rates, rel=1e-12)
    assert (optimizer.skipped_step, layouts.skipped_step) == (1, None)
    assert (dtype.dtype, len(dtype.rates)) == ("bfloat16", 1)
    assert dtype.tolerances_of(dtype.of_equal_terms[0]).gradient < 1e-6 < dtype.tolerances.gradient


def test_what_no_pass_covers_is_named() -> None:
    given = config(train__dtype="float32", model__router__force_balance=True)
    plan = passes.plan_passes(given, VerifySettings(num_ranks=1))
    assert [part.name for part in plan.passes] == ["layouts", "optimizer"]
    assert [reason.split(":")[0] for reason in plan.not_covered] == [
        "compute-dtype pass",
        "float64 reference",
    ]


def test_an_adam_update_is_off_by_more_where_a_gradient_is_next_to_nothing() -> None:
    settings = OptimSettings(lr=1.0, betas=(0.9, 0.9), eps=1e-12)
    errors = AdamErrors(settings=settings, updates=1, gradient=1e-4)
    even, uneven = torch.ones(100), torch.ones(100)
    uneven[0] = 1e-9

    def of(g: torch.Tensor) -> float:
        total = float(g.norm()) * 0.1**0.5
        return errors.of(0.1 * g, 0.1 * g**2, lr=1.0, total=total)[0]

    # Each of 100 elements by twice a relative error of 1e-4 / sqrt(100) · sqrt(100).
    assert of(even) == pytest.approx(10 * 2 * 1e-4, rel=0.02)
    assert of(uneven) > 1.9, "the sign of the first element is open"
    assert of(torch.zeros(5)) == 0.0


def test_an_optimizer_of_an_extension_has_no_pass_and_the_others_have_their_reference() -> None:
    given = config()
    object.__setattr__(given.optim, "name", "of_an_extension")
    plan = passes.plan_passes(given, VerifySettings(num_ranks=1))
    assert [part.name for part in plan.passes] == ["layouts", "compute dtype"]
    assert plan.reference_refuses == ()
    (said,) = plan.not_covered
    assert said.startswith("optimizer pass: optim.name=of_an_extension")


@pytest.mark.parametrize(
    ("exchange", "once", "rounds", "most"),
    [(None, True, 1, 2.0), ("each", False, 1, 2.0), ("2 rounds", True, 2, 2.0),
     ("recomputed", True, 1, 1.0)],
)  # fmt: skip
def test_a_layout_forces_its_way_of_the_exchange(
    exchange: str | None, once: bool, rounds: int, most: float
) -> None:
    layout = Layout(num_ranks=2, expert_degree=2, exchange=exchange)
    found = layout.of(config()).parallel.exchange
    assert (found.send_once, found.num_rounds, found.max_load) == (once, rounds, most)
    assert str(layout).endswith("replicate 1" if exchange is None else f"exchange {exchange}")
