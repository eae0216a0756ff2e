"""A real sweep's comparison, whatever happened to the sweep."""

import os
from functools import partial
from pathlib import Path

import pytest

from data_pipeline.locks import owner_of
from moetrain.compare.comparison import compare_runs
from moetrain.compare.text import as_text
from tests.launch.test_launching import kinds, wait_for
from tests.launch.test_sweeps import STOPPING, sweep
from tests.support.held_run import Hold
from tests.support.runs import write_shards

SHORT = [
    "launch.mode=inline", "train.num_steps=12", "checkpoint.every_steps=4",
    "train.validate_every_steps=6", "run.name=s",
]  # fmt: skip
SMALL = ["model.num_experts=2", "seed=0,1"]
WHOLE = ["model.num_experts=2,4", "seed=0,1,2"]


def newest(folder: Path) -> Path:
    return max((folder / "runs/sweeps").iterdir())


def has_stopped(folder: Path, name: str) -> bool:
    stopped = kinds(folder, name=name)[-1] == "stop"
    return stopped and owner_of(folder / "runs" / name / "lock") is None


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_that_was_killed_extended_and_moved_compares_like_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    shards = write_shards(tmp_path)
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    for folder in (calm, rough):
        folder.mkdir()
    with sweep(calm, shards, *SHORT, *WHOLE) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    expected = as_text(compare_runs([str(newest(calm))]))
    assert "compared  6 runs in 2 arms, 3 seeds each: validation/loss" in expected
    assert expected in output, "the sweep ends with it"
    assert (newest(calm) / "compare.html").is_file()

    # Early and late in the first trial, and in the second.
    for name, step in (("s-1", 2), ("s-1", 9), ("s-2", 2)):
        hold = Hold(tmp_path / "held", step=step)
        environment = os.environ | hold.environment
        with sweep(rough, shards, *SHORT, *SMALL, env=environment) as process:
            wait_for(hold.is_held, f"step {step} of {name}", seconds=100)
            assert "finish" not in kinds(rough, name=name)
            process.kill()
            assert process.stderr is not None
            # The trial outlives its sweep until it has heard of the stop.
            assert any(STOPPING in line for line in process.stderr)
            hold.release()
            wait_for(partial(has_stopped, rough, name), f"the stop of {name}", seconds=60)
        so_far = compare_runs([str(newest(rough))], measure="train/cross_entropy", at="common")
        assert so_far.main.results, "what a killed sweep has is known"
    with sweep(rough, shards, *SHORT, *WHOLE) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    rough.rename(tmp_path / "moved")
    moved = compare_runs([str(newest(tmp_path / "moved"))])
    assert as_text(moved) == expected
    assert kinds(tmp_path / "moved", name="s-1").count("stop") == 2
