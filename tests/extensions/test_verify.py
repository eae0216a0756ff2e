"""`moetrain verify` distinguishes a custom router that is exact from one that isn't."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.extensions.lab import write_lab
from tests.verify.test_verify import ROOT, TINY

pytestmark = pytest.mark.slow


def verify(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Verifies a tiny model by the installed package's things."""
    path = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, "-m", "moetrain", "verify", "+model=toy", *TINY, *words],
        cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def test_a_router_of_a_users_own_is_told_to_be_exact_or_not(tmp_path: Path) -> None:
    folder = write_lab(tmp_path)
    # An installed package's entry point is enough: nothing is named in `extensions`.
    said = verify(
        folder, "model.router.name=lab_noisy", "model.router.options.temperature=2",
        "model.experts.function=lab_relu2", "model.num_shared_experts=1",
        "train.objective=lab_plain", "observe.metrics=[lab_metric]", "parallel.recompute=full",
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    assert "layouts train alike" in said.stdout
    assert "as the float64 reference" not in said.stdout
    (left_out,) = [line for line in said.stdout.splitlines() if "it can't compute" in line]
    for name in ("router.name=lab_noisy", "function=lab_relu2", "objective=lab_plain"):
        assert name in left_out
    said = verify(folder, "extensions=[lab]", "model.router.name=lab_of_batch")
    assert said.returncode == 1, said.stdout + said.stderr
    assert "1 rank: expert 1, shard 1, replicate 1" not in said.stdout.split("FAIL")[-1]
    assert "FAIL" in said.stdout
