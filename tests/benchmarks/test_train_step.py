"""The step benchmark: both sides begin at the same loss, so they train the same model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_both_sides_have_the_same_loss_on_the_first_batch() -> None:
    command = [sys.executable, "-m", "benchmarks.train_step"]
    result = subprocess.run(  # a process of its own: it joins a process group
        [*command, "--cases", "toy,2,2,32", "--rounds", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    ours, *theirs = records
    assert [r["implementation"].split()[-1] for r in theirs] == ["eager", "grouped_mm"]
    for record in records:
        assert record["tokens_per_second"] == 64 / record["seconds"][1]
        assert record["ratio_to_moetrain"] == ours["seconds"][1] / record["seconds"][1]
        # A mean of 64 tokens' float32 losses: a few units in the last place apart.
        assert record["cross_entropy_of_first_batch"] == pytest.approx(
            ours["cross_entropy_of_first_batch"], rel=1e-6
        )
