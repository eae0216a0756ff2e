"""The data benchmark: all ways to read give as many tokens, and ours is compared with the limit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_way_to_read_is_timed_beside_the_limit() -> None:
    command = [sys.executable, "-m", "benchmarks.data", "--parts", "read", "--rounds", "1"]
    result = subprocess.run(
        [*command, "--document-tokens", "3000", "--megatokens", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["implementation"].split()[0] for r in records] == [
        "limit", "moetrain", "webdataset", "torchdata",
    ]  # fmt: skip
    tokens = {r["tokens_per_second"] * r["seconds"][1] for r in records}
    assert len({round(count) for count in tokens}) == 1
    for record in records:
        assert record["ratio_to_limit"] == records[0]["seconds"][1] / record["seconds"][1]
