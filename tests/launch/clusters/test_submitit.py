"""`hydra/launcher=submitit_slurm` on a real Slurm: the trials of a sweep are its jobs."""

import json
import sys
from pathlib import Path

import pytest

from tests.launch.clusters.hosts import hosts
from tests.launch.clusters.test_slurm import WHY_NOT, Slurm
from tests.launch.test_sweep_plugins import installed
from tests.launch.test_sweeps import BARE
from tests.support.runs import metrics_of, write_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(590),
    pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT)),
    installed("hydra_submitit_launcher"),
]


def test_trials_are_slurm_jobs_and_the_same_command_goes_on(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    words = [
        sys.executable, "-m", "moetrain", "-m", *BARE, f"data.dir={shards}", "run.name=s",
        f"run.dir={tmp_path}/runs", "train.num_steps=6", "launch.mode=inline",
        "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=20",
    ]  # fmt: skip
    with hosts(1) as members:
        slurm = Slurm(tmp_path, members)
        output = slurm.run(slurm.head, *words, "optim.lr=1e-3,1e-2")
        assert "sweep     2 done" in output
        again = slurm.run(slurm.head, *words, "optim.lr=3e-2,1e-2")
        assert "sweep     2 done" in again
        jobs = slurm.run(slurm.head, "scontrol", "show", "job", "--oneliner")
        assert jobs.count("JobState=COMPLETED") == 3, jobs
    newest = max((tmp_path / "runs/sweeps").iterdir())
    trials = [json.loads(line) for line in (newest / "trials.jsonl").read_text().splitlines()]
    found = {t["varied"]["optim.lr"]: (Path(t["run"]).name, t["validation_loss"]) for t in trials}
    assert found == {
        rate: (name, metrics_of(tmp_path, name)[-1]["validation/loss"])
        for rate, name in (("0.03", "s-3"), ("0.01", "s-2"))
    }
