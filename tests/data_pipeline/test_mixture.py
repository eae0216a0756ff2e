"""Each source has its share to one sample, at any time, over stages, pauses and new weights."""

import json
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from data_pipeline import DataError, DataSettings
from data_pipeline.reading.mixture import (
    MAX_DENOMINATOR,
    Mixture,
    MixturePosition,
    Stage,
    assignment_cycle,
    exact_units,
    planned_stages,
    position_from,
    used_sources,
)
from data_pipeline.settings import StageSettings

SOURCES = ("en", "fr", "de")
BASE = Stage(from_step=0, units={"en": 6, "fr": 3, "de": 1})
LATER = Stage(from_step=5, units={"en": 1, "de": 2})


def mixture(*stages: Stage, size: int = 8, position: MixturePosition | None = None) -> Mixture:
    return Mixture(SOURCES, stages=stages, samples_per_step=size, position=position)


def assigned(chosen: Mixture, first: int, end: int) -> list[tuple[str, int]]:
    sources, numbers = chosen.assigned(np.arange(first, end))
    return [(SOURCES[s], n) for s, n in zip(sources.tolist(), numbers.tolist(), strict=True)]


def through_json(position: MixturePosition) -> MixturePosition:
    return position_from(json.loads(json.dumps(asdict(position))))


def assert_nothing_lost_or_repeated(samples: list[tuple[str, int]]) -> None:
    for source in SOURCES:
        numbers = [number for name, number in samples if name == source]
        assert numbers == list(range(len(numbers)))


def test_shares_are_exact_to_one_sample_at_every_moment() -> None:
    random = np.random.default_rng(0)
    for units in [
        [1], [1, 1], [997, 1], [1, 1, 998], [33_333, 33_333, 33_334], [5, 0, 3], *(
            random.integers(1, 60, size=int(random.integers(2, 12))).tolist() for _ in range(60)
        ),
    ]:  # fmt: skip
        cycle, total = assignment_cycle(units), sum(units)
        drawn = np.cumsum(np.tile(cycle, 2)[:, None] == np.arange(len(units)), axis=0)
        samples = np.arange(1, len(drawn) + 1)[:, None]
        bound = 1 - 1 / (2 * sum(map(bool, units)) - 2) if sum(map(bool, units)) > 1 else 0
        if units[0] != 1 or len(units) > 1:
            assert len(cycle) == total
        worst = np.abs(drawn - samples * np.array(units) / total).max()
        assert worst <= bound + 1e-9
        assert worst < 1


def test_a_sample_is_found_wherever_it_is() -> None:
    chosen = mixture(BASE)
    samples = assigned(chosen, 0, 1000)
    assert_nothing_lost_or_repeated(samples)
    far = 10**12
    drawn = chosen.drawn(far)
    assert drawn == {"en": 6 * 10**11, "fr": 3 * 10**11, "de": 10**11}
    for source, number in assigned(chosen, far, far + 1000):
        assert number == drawn[source]
        drawn[source] += 1
    assert drawn == chosen.drawn(far + 1000)
    assert sum(chosen.drawn(777).values()) == 777


def test_stages_begin_at_their_steps_and_go_on_in_each_source() -> None:
    chosen = mixture(BASE, LATER, size=8)
    samples = assigned(chosen, 0, 200)
    assert_nothing_lost_or_repeated(samples)
    assert samples[:40] == assigned(mixture(BASE), 0, 40)
    assert {source for source, _ in samples[40:]} == {"en", "de"}
    before, after = chosen.drawn(40), chosen.drawn(40 + 99)
    assert (after["en"] - before["en"], after["de"] - before["de"]) == (33, 66)
    assert after["fr"] == before["fr"]


@pytest.mark.parametrize("step", [1, 3, 5, 6, 20])
def test_a_pause_changes_nothing(step: int) -> None:
    whole = mixture(BASE, LATER)
    position = through_json(whole.position(step * 8))
    resumed = mixture(BASE, LATER, position=position)
    assert assigned(resumed, step * 8, 300) == assigned(whole, step * 8, 300)
    # And again, from what the resumed one says.
    position = through_json(resumed.position((step + 3) * 8))
    again = mixture(BASE, LATER, position=position)
    assert assigned(again, (step + 3) * 8, 300) == assigned(whole, (step + 3) * 8, 300)
    assert again.drawn(300) == whole.drawn(300)


def test_new_weights_lose_and_repeat_nothing() -> None:
    first = mixture(BASE)
    position = through_json(first.position(24))
    other = mixture(Stage(from_step=0, units={"fr": 1, "de": 1}), position=position)
    position = through_json(other.position(48))
    third = mixture(BASE, position=position)
    samples = assigned(first, 0, 24) + assigned(other, 24, 48) + assigned(third, 48, 300)
    assert_nothing_lost_or_repeated(samples)
    assert {source for source, _ in samples[24:48]} == {"fr", "de"}
    assert third.drawn(48) == other.drawn(48)
    assert third.drawn(48)["en"] == first.drawn(24)["en"]


def test_another_batch_size_moves_no_sample_but_the_stages_to_come() -> None:
    whole = mixture(BASE)
    resumed = mixture(BASE, size=6, position=through_json(whole.position(24)))
    assert assigned(resumed, 24, 200) == assigned(whole, 24, 200)
    with_stage = mixture(BASE, LATER, size=6, position=through_json(whole.position(24)))
    assert with_stage.step_at(24) == 3
    samples = assigned(whole, 0, 24) + assigned(with_stage, 24, 200)
    assert_nothing_lost_or_repeated(samples)
    assert samples[:36] == assigned(whole, 0, 36)
    assert "fr" not in {source for source, _ in samples[36:]}
    assert with_stage.position(36).step == 5


def test_what_is_before_a_position_is_refused() -> None:
    position = mixture(BASE).position(24)
    other = mixture(Stage(from_step=0, units={"fr": 1}), position=position)
    with pytest.raises(ValueError, match="sample 23 is before 24"):
        other.assigned(np.arange(23, 30))
    with pytest.raises(ValueError, match="no step begins at sample 25"):
        other.position(25)


def test_when_a_source_is_over() -> None:
    chosen = mixture(BASE, LATER)
    samples = assigned(chosen, 0, 200)
    for source, number in (("en", 0), ("fr", 11), ("de", 60)):
        assert chosen.first_after(source, number=number, end=200) == samples.index((source, number))
    assert chosen.first_after("fr", number=12, end=10**9) is None


def test_units_are_exact_where_they_can_be() -> None:
    assert exact_units({"a": Fraction("0.1"), "b": Fraction("0.2"), "c": Fraction("0.7")}) == {
        "a": 1, "b": 2, "c": 7
    }  # fmt: skip
    assert exact_units({"a": Fraction(3), "b": Fraction(1)}) == {"a": 3, "b": 1}
    assert exact_units({"a": Fraction(7)}) == {"a": 1}


def test_other_units_are_rounded_to_the_nearest() -> None:
    weights = {"a": Fraction(1, 3), "b": Fraction(2**40, 7), "c": Fraction(2**40 + 1, 7)}
    units = exact_units({name: weight + 2**38 for name, weight in weights.items()})
    total = sum(weights.values()) + 3 * 2**38
    assert sum(units.values()) <= MAX_DENOMINATOR
    for name, number in units.items():
        share = float((weights[name] + 2**38) / total)
        assert abs(number / sum(units.values()) - share) < 1 / MAX_DENOMINATOR
    with pytest.raises(DataError, match=r"'a' would be .* can't be kept to"):
        exact_units(weights)


def test_weights_follow_from_what_is_set() -> None:
    sizes = {"en": 400, "fr": 100}
    by_size, even, by_epochs, given = (
        planned_stages(DataSettings(**settings), sizes=sizes)[0].weights
        for settings in (
            {},
            {"temperature": 2.0},
            {"epochs": {"en": 0.5, "fr": 3.0}},
            {"weights": {"fr": 0.25, "en": 0.75}},
        )
    )
    assert by_size == {"en": 0.8, "fr": 0.2}
    assert even == pytest.approx({"en": 2 / 3, "fr": 1 / 3}, abs=1 / MAX_DENOMINATOR)
    assert by_epochs == {"en": 0.4, "fr": 0.6}
    assert given == {"en": 0.75, "fr": 0.25}


def test_sources_that_are_not_named_are_left_out() -> None:
    stage = StageSettings(from_step=3, weights={"de": 1.0})
    assert used_sources(DataSettings(), sources=SOURCES) == SOURCES
    assert used_sources(DataSettings(weights={"fr": 1.0}), sources=SOURCES) == ("fr",)
    assert used_sources(DataSettings(epochs={"fr": 1.0}, stages=[stage]), sources=SOURCES) == (
        "fr", "de"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"en": 1.0}, "temperature": 2.0}, "data.weights and data.temperature"),
        ({"weights": {"en": 1.0}, "epochs": {"en": 1.0}}, "data.weights and data.epochs"),
        ({"weights": {"em": 1.0}}, "'em', which isn't in the folder; did you mean 'en'"),
        (
            {"stages": [StageSettings(from_step=2, weights={})]},
            r"data.stages\[0\].weights names no source",
        ),
        ({"weights": {"en": 0.0}}, "data.weights.en=0.0 must be a number above zero"),
        ({"epochs": {"en": 1.0, "fr": -1.0}}, "data.epochs.fr=-1.0 must be"),
        (
            {"stages": [StageSettings(from_step=2, weights={"en": 0.0})]},
            r"data.stages\[0\].weights.en=0.0",
        ),
        (
            {
                "stages": [
                    StageSettings(from_step=2, weights={"en": 1.0}),
                    StageSettings(from_step=2, weights={"fr": 1.0}),
                ]
            },
            r"data.stages\[1\].from_step=2 isn't after 2",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        used_sources(DataSettings(**settings), sources=SOURCES)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(weight: float) -> None:
    # The settings' own types refuse it before; DataError and pydantic's error are ValueErrors.
    with pytest.raises(ValueError, match=r"en(.|\n)*finite|data.weights.en"):
        used_sources(DataSettings(weights={"en": weight}), sources=SOURCES)


def test_a_damaged_position_is_refused() -> None:
    record = asdict(mixture(BASE).position(8))
    with pytest.raises(DataError, match=r"drawn\.en"):
        position_from({**record, "drawn": {"en": "many"}})
    with pytest.raises(DataError, match="damaged"):
        position_from({})
