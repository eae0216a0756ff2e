"""The drills, and that the comparison of two runs detects a difference.

`make drills` runs them as well, and checks them against their targets.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.drills.drill import Result, Run, Site, is_as_if_undisturbed, table
from tests.drills.faults import Fault, arm, variables
from tests.drills.single_host import DRILLS, this_machine

ROOT = str(Path(__file__).parents[2])
TIMES_AS_SLOW = 4  # as the machine of the targets: this one may be busy
HANG_SECONDS = 20  # for the same reason: a slow rank must not count as hanging


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return this_machine(tmp_path_factory.mktemp("drills"), hang_seconds=HANG_SECONDS)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", DRILLS)
def test_a_run_with_a_fault_ends_as_if_without(site: Site, name: str) -> None:
    result = DRILLS[name](site)
    if result.skipped:
        pytest.skip(result.skipped)
    assert not result.problems, result
    if result.target is not None:
        assert result.next_step is not None
        assert result.next_step < TIMES_AS_SLOW * result.target, result


@pytest.mark.slow
def test_another_metric_another_weight_and_a_missing_step_are_detected(
    site: Site, tmp_path: Path
) -> None:
    whole = site.undisturbed()

    def compared(corrupt: str) -> list[str]:
        copy = Run(site, corrupt, at=tmp_path)
        shutil.copytree(whole.folder, copy.folder)
        metrics = copy.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True)
        if corrupt == "metric":
            record = json.loads(lines[40])
            record["train/loss"] += 1e-12
            lines[40] = json.dumps(record) + "\n"
        elif corrupt == "step":
            del lines[40]
        elif corrupt == "weights":
            (file,) = list(copy.checkpoint().glob("*00001.safetensors"))
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        metrics.write_text("".join(lines))
        result = Result(drill=corrupt)
        is_as_if_undisturbed(copy, whole, result)
        return result.problems

    assert compared("nothing") == []
    assert compared("metric") == ["other metrics from step 41 on"]
    assert compared("step")[0].startswith("steps [1, 2")
    assert compared("weights") == ["other weights at the end"]


def listener(folder: Path, phases: str) -> subprocess.CompletedProcess[str]:
    """Goes through phases as the only rank of a world would; prints each that it gets to."""
    code = f"""
import torch.distributed as dist
from moetrain.parallel.activity import Activity
dist.init_process_group("gloo", init_method="file://{folder}/meet", rank=0, world_size=1)
activity = Activity()
for step in (1, 2):
    for phase in {phases.split()}:
        activity.begin(phase, step=step)
        print(step, phase, flush=True)
"""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables(folder, python_path=ROOT),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_fault_is_injected_at_its_point_and_only_once(tmp_path: Path) -> None:
    armed = arm(Fault(at="end", phase="optimizer", rank=0, step=2), tmp_path)
    assert armed.injected() is None
    first = listener(tmp_path, "forward optimizer save")
    assert first.returncode == -signal.SIGKILL
    assert first.stdout.splitlines()[-1] == "2 optimizer", "what comes after it is not begun"
    assert armed.injected() is not None
    (tmp_path / "meet").unlink()
    second = listener(tmp_path, "forward optimizer save")
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines()[-1] == "2 save"


def test_a_fault_of_another_rank_is_not_injected(tmp_path: Path) -> None:
    armed = arm(Fault(at="begin", phase="forward", rank=1, step=2), tmp_path)
    assert listener(tmp_path, "forward").returncode == 0
    assert armed.injected() is None


def test_the_table_tells_what_failed_and_what_was_late() -> None:
    results = [
        Result(drill="good", next_step=3.0, target=15.0, curve="equal bit for bit"),
        Result(drill="slow", next_step=16.0, target=15.0),
        Result(drill="never", target=15.0),
        Result(drill="undetected", next_step=3.0, target=15.0, detected=2.1, detection_target=2.0),
        Result(drill="bad", problems=["other weights at the end"]),
        Result(drill="left out", target=15.0, skipped="no root"),
    ]
    verdicts = [line.split("|")[-2].strip() for line in table(results).splitlines()[2:8]]
    assert verdicts == ["passes", "late", "late", "late", "FAILED", "skipped"]
    assert "**other weights at the end**" in table(results)
