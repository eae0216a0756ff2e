"""launch/clusters/slurm.sbatch on a real Slurm: a controller, and two nodes made of namespaces."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.clusters.hosts import Host, hosts, missing, search_path
from tests.launch.clusters.training import TINY, steps, wait_for
from tests.support.runs import events_of, write_shards

ROOT = Path(__file__).parents[3]
WHY_NOT = missing("sbatch", "slurmctld", "slurmd", "munged")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(590),
    pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT)),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={controller}({address})
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
MpiDefault=none
ReturnToService=2
KillWait=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A controller on the first host, and a node on each."""

    def __init__(self, folder: Path, members: list[Host]) -> None:
        self.folder, self.head = folder, members[0]
        nodes = "\n".join(
            f"NodeName={h.name} NodeAddr={h.address} CPUs={os.cpu_count()} Gres=gpu:8"
            for h in members
        )
        written = CONFIGURATION.format(
            controller=members[0].name, address=members[0].address, folder=folder, nodes=nodes
        )
        (folder / "slurm.conf").write_text(written)
        # The script asks for GPUs, and Slurm wants to see a device for each: these are /dev/null.
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        for index in range(8):
            os.mknod(folder / f"gpu{index}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # don't look for any
        for name in ("state", *(f"spool-{h.name}" for h in members)):
            (folder / name).mkdir()
        (folder / "munge").mkdir(mode=0o700)
        (folder / "munge/key").write_bytes(os.urandom(64))
        (folder / "munge/key").chmod(0o600)
        files = [
            f"--{name}={folder}/munge/{name}"
            for name in ("socket", "pid-file", "log-file", "seed-file")
        ]
        self.run(self.head, "munged", "--force", f"--key-file={folder}/munge/key", *files)
        self.run(self.head, "slurmctld")
        for host in members:
            self.run(host, "slurmd")

    def run(self, host: Host, *command: str, **environment: str) -> str:
        values = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{search_path()}",
            "SLURM_CONF": f"{self.folder}/slurm.conf",
            **environment,
        }
        done = subprocess.run(
            host.inside(*command, folder=ROOT),
            env=values,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """Returns what Slurm says of a job."""
        shown = self.run(self.head, "scontrol", "show", "job", job, "--oneliner")
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)["JobState"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with hosts(2) as members:
        yield Slurm(tmp_path_factory.mktemp("slurm"), members)


def test_tasks_of_srun_on_two_nodes_are_the_ranks_of_one_run(slurm: Slurm, tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    run = [
        sys.executable, "-m", "moetrain", *TINY, f"data.dir={shards}", f"run.dir={tmp_path}/runs",
        "launch.num_workers=3", "model.num_experts=3", "train.global_batch_size=6",
        "train.num_steps=6",
    ]  # fmt: skip
    # Two tasks on one node, and one on the other.
    said = slurm.run(slurm.head, "srun", "--nodes=2", "--ntasks=3", "--distribution=cyclic", *run)
    assert said.count("tokens/s (median)") == 1
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [e["event"] for e in events_of(tmp_path)].count("start") == 1
    logs = sorted(log.name for log in (tmp_path / "runs/tiny/logs").glob("rank_*.log"))
    assert logs == ["rank_000.log", "rank_001.log", "rank_002.log"]


def test_a_command_that_sbatch_runs_itself_is_one_process(slurm: Slurm, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    look = tmp_path / "look.py"
    look.write_text(
        "import os; from launch.external import external_rank; "
        "print(os.environ['SLURM_NTASKS'], external_rank(os.environ))"
    )
    slurm.run(
        slurm.head,
        "sbatch",
        "--wait",
        "--nodes=2",
        "--ntasks=4",
        f"--output={log}",
        f"--wrap=PYTHONPATH={ROOT} {sys.executable} {look}",
    )
    assert log.read_text() == "4 None\n"


def test_a_job_on_two_nodes_saves_when_its_time_is_up_and_goes_on(
    slurm: Slurm, tmp_path: Path
) -> None:
    shards = write_shards(tmp_path)
    log = tmp_path / "job.log"
    submitted = slurm.run(
        slurm.head, "sbatch", "--parsable", "--nodes=2", f"--output={log}",
        "launch/clusters/slurm.sbatch", *TINY, f"data.dir={shards}", f"run.dir={tmp_path}/runs",
        VENV=str(Path(sys.executable).parents[1]), HEAD_ADDRESS=slurm.head.address,
        RAY_OVERRIDE_RESOURCES='{"CPU": 1}',  # so that two ranks need both nodes
        # A node without head ends; is 60. `ray stop` takes 16 s, and what called it must live on.
        RAY_gcs_rpc_server_reconnect_timeout_s="25",
    )  # fmt: skip
    job = submitted.strip()
    wait_for(lambda: len(steps(tmp_path)) > 5, lambda: f"step 6: {log.read_text()}")
    [attempt] = [e for e in events_of(tmp_path) if e["event"] == "attempt"]
    assert {r["node"] for r in attempt["ranks"]} == {"10.77.0.1", "10.77.0.2"}

    # What Slurm sends before a time limit: SIGTERM to the batch script alone.
    slurm.run(slurm.head, "scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: events_of(tmp_path)[-1]["event"] == "stop", lambda: f"stop: {log.read_text()}")
    saved = [e for e in events_of(tmp_path) if e["event"] == "save"][-1]["step"]
    assert saved == events_of(tmp_path)[-1]["step"] == steps(tmp_path)[-1]
    wait_for(
        lambda: slurm.state(job) in ("PENDING", "CONFIGURING"),
        lambda: f"requeue: {slurm.state(job)} {log.read_text()}",
    )
    assert not (ROOT / f".ray-token-{job}").exists()
    slurm.run(slurm.head, "scancel", job)
