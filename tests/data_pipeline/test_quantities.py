"""Durations, sizes and counts as people read them, at the borders between units."""

import pytest

from data_pipeline.quantities import (
    binary_size,
    count,
    decimal_size,
    duration,
    rounded_duration,
)

DAY = 86_400.0


def test_durations_are_told_in_their_two_largest_units() -> None:
    told = {0.0: "0.0 s", 9.44: "9.4 s", 59.94: "59.9 s", 59.97: "1 min 0 s", 70: "1 min 10 s",
            3569.4: "59 min 29 s", 3570: "1 h 0 min", 3599: "1 h 0 min", 11100: "3 h 5 min",
            86399: "1 d 0 h", 190000: "2 d 5 h", 1e8: "1,157 d 10 h"}  # fmt: skip
    assert {seconds: duration(seconds) for seconds in told} == told


def test_what_is_counted_down_has_whole_seconds_and_is_never_below_none() -> None:
    told = {-3.0: "0 s", 0.4: "0 s", 9.44: "9 s", 59.4: "59 s", 59.6: "1 min 0 s",
            100: "1 min 40 s", 900: "15 min 0 s", 190000: "2 d 5 h"}  # fmt: skip
    assert {seconds: duration(seconds, whole=True) for seconds in told} == told


def test_estimates_have_three_digits_in_one_unit() -> None:
    told = {0.041: "0.041 s", 506: "506 s", 600: "10 min", 5760: "96 min", 8136: "2.26 h",
            2.4 * DAY: "2.4 days", 154 * DAY: "154 days", 12345 * DAY: "12,345 days"}  # fmt: skip
    assert {seconds: rounded_duration(seconds) for seconds in told} == told


@pytest.mark.parametrize(
    ("num_bytes", "decimal", "binary"),
    [
        (0, "0 bytes", "0 KiB"),
        (1, "1 byte", "0.000977 KiB"),
        (999, "999 bytes", "0.976 KiB"),
        (12_100_000, "12.1 MB", "11.5 MiB"),
        (2**20, "1.0 MB", "1 MiB"),
        (1000 * 2**20, "1.0 GB", "0.977 GiB"),
        (1.5 * 2**30, "1.6 GB", "1.5 GiB"),
        (3000 * 2**40, "3.3 PB", "3,000 TiB"),
    ],
)
def test_sizes(num_bytes: float, decimal: str, binary: str) -> None:
    assert decimal_size(num_bytes) == decimal
    assert binary_size(num_bytes) == binary


def test_counts_have_three_digits_and_never_a_power_of_ten() -> None:
    told = {0: "0", 2.346: "2.35", 950: "950", 999.4: "999", 999.6: "1 k", 5460: "5.46 k",
            999_999: "1 M", 46.7e9: "46.7 B", 1.23e12: "1.23 T", 4.5e15: "4,500 T",
            -5460: "-5.46 k"}  # fmt: skip
    assert {number: count(number) for number in told} == told
    assert count(2e9, billion="G") == "2 G"
    assert count(float("inf")) == "inf"
