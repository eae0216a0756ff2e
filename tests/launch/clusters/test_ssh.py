"""launch/clusters/ssh.sh: real SSH servers and real Ray on two hosts made of namespaces."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.clusters.hosts import Host, hosts, missing, search_path
from tests.launch.clusters.training import TINY, steps, wait_for
from tests.support.runs import events_of, write_shards

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "launch/clusters/ssh.sh"

WHY_NOT = missing("sshd", "ssh-keygen")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(590),
    pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT)),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator["SshCluster"]:
    with hosts(3) as (head, worker, mine):
        yield SshCluster(tmp_path, serving=[head, worker], mine=mine)


class SshCluster:
    """Two hosts with SSH servers, and a third that the script is called on."""

    def __init__(self, folder: Path, *, serving: list[Host], mine: Host) -> None:
        self.folder, self.serving, self.mine = folder, serving, mine
        for name in ("host_key", "key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)],
                check=True,
            )
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\n"
            "PermitRootLogin prohibit-password\nPidFile none\nUsePAM no\n"
        )
        sshd = f"mkdir -p /run/sshd && exec $(command -v sshd) -f {folder}/sshd_config"
        for host in serving:
            subprocess.run(host.inside("bash", "-c", sshd), check=True, env={"PATH": search_path()})

    def start_call(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Starts ssh.sh on the third host, in the folder that holds the code."""
        values = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{search_path()}",
            "HOSTS": " ".join(f"root@{host.address}" for host in self.serving),
            "VENV": str(Path(sys.executable).parents[1]),
            "SSH": f"ssh -i {self.folder}/key -o BatchMode=yes -o StrictHostKeyChecking=no"
            " -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
            # A CPU each, so that two ranks need both hosts.
            "RAY_START": "--num-cpus=1 --object-store-memory=80000000",
            **environment,
        }
        return subprocess.Popen(
            self.mine.inside("bash", str(SCRIPT), *arguments, folder=ROOT), env=values, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def call(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start_call(*arguments, **environment)
        output, _ = process.communicate(timeout=150)
        return process.returncode, output


def test_a_run_on_two_machines_by_ssh(cluster: SshCluster, tmp_path: Path) -> None:
    """It trains on both; a stranger's token gets nowhere; `stop` lets it save first."""
    shards = write_shards(tmp_path)
    code, said = cluster.call("start")
    assert code == 0, said
    assert re.search(r"2\.0 CPU", said), said

    train = ["submit", *TINY, f"data.dir={shards}", f"run.dir={tmp_path}/runs"]
    running = cluster.start_call(*train)
    wait_for(lambda: len(steps(tmp_path)) > 5, lambda: "no step 6")
    [attempt] = [e for e in events_of(tmp_path) if e["event"] == "attempt"]
    assert {r["node"] for r in attempt["ranks"]} == {h.address for h in cluster.serving}

    other = tmp_path / "other_token"
    other.write_text("0" * 64)
    code, said = cluster.call(*train, RAY_AUTH_TOKEN_PATH=str(other), LOCAL_PORT="8266")
    assert code != 0
    assert "authentication token is invalid" in said.lower(), said

    code, said = cluster.call("stop")
    assert code == 0, said
    running.communicate(timeout=60)
    *_, save, stop = events_of(tmp_path)
    assert (save["event"], stop["event"]) == ("save", "stop")
    assert save["step"] == stop["step"] == steps(tmp_path)[-1]
    for host in cluster.serving:
        left = subprocess.run(host.inside("ps", "ax"), capture_output=True, text=True, check=True)
        assert "raylet" not in left.stdout
