"""Statistics of a few seeds, against published tables and examples."""

import math

import pytest

from moetrain.compare.noise import estimate, holm, paired, t_quantile, two_sided, welch

# Student's sleep data (1908), as R's documentation has it: hours gained by two drugs.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045)]
)
def test_quantiles_are_those_of_a_published_table(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)
    assert two_sided(t_quantile(freedom), freedom) == pytest.approx(0.05, rel=1e-9)


def test_a_mean_of_three_has_the_interval_worked_out_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    half = 4.302652729749464 / math.sqrt(3)
    assert (found.mean, found.n, found.deviation) == (2.0, 3, 1.0)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-9)
    alone = estimate([1.5])
    assert (alone.mean, alone.n) == (1.5, 1)
    assert alone.deviation is alone.low is alone.high is None


def test_paired_and_unpaired_differences_are_those_of_r() -> None:
    both = paired(FIRST, SECOND)  # t.test(paired = TRUE)
    assert both.value == pytest.approx(-1.58)
    assert (both.low, both.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
    assert both.p == pytest.approx(0.002833, abs=5e-7)
    apart = welch(FIRST, SECOND)  # t.test()
    assert apart.value == pytest.approx(-1.58)
    assert (apart.low, apart.high) == pytest.approx((-3.3654832, 0.2054832), abs=1e-7)
    assert apart.p == pytest.approx(0.07939, abs=5e-6)


def test_one_value_says_nothing_of_noise_and_equal_differences_have_none() -> None:
    for alone in (paired([1.0], [0.5]), welch([1.0], [0.5, 0.6])):
        assert (alone.method, alone.p, alone.low) == ("none", None, None)
    equal = paired([1.0, 2.0], [1.0, 2.0])
    assert (equal.value, equal.low, equal.high, equal.p) == (0.0, 0.0, 0.0, 1.0)
    shifted = paired([1.5, 2.5], [1.0, 2.0])
    assert (shifted.value, shifted.p) == (0.5, 0.0)


def test_several_comparisons_are_corrected_in_their_order() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}
