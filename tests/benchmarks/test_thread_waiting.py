"""The benchmark of waiting threads: each setting is timed in a process that began with it."""

import pytest

from benchmarks import thread_waiting


@pytest.mark.slow
def test_each_setting_is_timed_beside_each_number_of_busy_processes() -> None:
    settings = ["GOMP_SPINCOUNT=1000", "OMP_WAIT_POLICY=passive"]
    records = thread_waiting.measure(
        "products", settings=settings, busy=[0, 1], threads=2, rounds=1
    )
    assert [(r["implementation"], r["case"]["busy_processes"]) for r in records] == [
        (setting, busy) for busy in (0, 1) for setting in settings
    ]
    for record in records:
        assert record["seconds"] == sorted(record["seconds"])
        assert record["seconds"][0] > 0.0
    assert [r["ratio_to_first"] for r in records[::2]] == [1.0, 1.0]
