"""What launch/clusters/skypilot.yaml runs on its nodes, on two hosts made of namespaces.

SkyPilot itself isn't there: the test gives its variables and calls the script on each node.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.clusters.hosts import Host, hosts, missing, search_path
from tests.launch.clusters.training import TINY, steps, wait_for
from tests.support.runs import events_of, write_shards

ROOT = Path(__file__).parents[3]
WHY_NOT = missing()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(590),
    pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT)),
]


def start(host: Host, rank: int, members: list[Host], train: list[str]) -> subprocess.Popen[str]:
    """Starts what SkyPilot would run on a node."""
    task = yaml.safe_load((ROOT / "launch/clusters/skypilot.yaml").read_text())
    environment = {
        **os.environ,
        "PATH": search_path(),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "\n".join(member.address for member in members),
        "VENV": str(Path(sys.executable).parents[1]),
        "TRAIN": " ".join(train),
        "RAY_AUTH_TOKEN": "0123456789abcdef",
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 1}',  # so that two ranks need both hosts
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # a node without head ends; is 60
    }
    return subprocess.Popen(
        host.inside("bash", "-c", task["run"], folder=ROOT), env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_the_nodes_of_a_task_train_together_and_end_together(tmp_path: Path) -> None:
    train = [*TINY, f"data.dir={write_shards(tmp_path)}", f"run.dir={tmp_path}/runs"]
    with hosts(2) as members:
        nodes = [start(host, rank, members, train) for rank, host in enumerate(members)]
        wait_for(lambda: len(steps(tmp_path)) > 5, lambda: "no step 6")
        [attempt] = [e for e in events_of(tmp_path) if e["event"] == "attempt"]
        assert {r["node"] for r in attempt["ranks"]} == {h.address for h in members}
        [driver] = [e["pid"] for e in events_of(tmp_path) if e["event"] == "start"]
        subprocess.run(members[0].inside("kill", "-TERM", str(driver)), check=True)  # its own pid
        said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [75, 0], said
    assert events_of(tmp_path)[-1]["event"] == "stop"
