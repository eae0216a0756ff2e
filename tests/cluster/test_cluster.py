"""Runs on a real Ray cluster over several hosts, each a network namespace of this machine.

The quick drills; `make cluster-test` runs all of them and holds them to their targets.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drills.cluster import DRILLS, ClusterSite, four_hosts
from tests.drills.hosts import Hosts, clear_abandoned, no_hosts_because

WHY_NOT = no_hosts_because()
TIMES_AS_SLOW = 4  # as the machine that the targets are for: it may be busy

pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no hosts here: {WHY_NOT}"),
    pytest.mark.timeout(400),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSite]:
    with four_hosts(tmp_path_factory.mktemp("cluster")) as site:
        yield site


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank", "power", "cut", "drain", "elastic"])
def test_a_run_whose_hosts_have_a_fault_ends_as_if_without(site: ClusterSite, name: str) -> None:
    result = DRILLS[name](site)
    assert not result.problems, result
    assert result.target is not None
    assert result.next_step is not None
    assert result.next_step < TIMES_AS_SLOW * result.target, result


def reaches(hosts: Hosts, address: str) -> bool:
    """Returns whether host 0 gets an answer at an address within a second."""
    code = f"import socket; socket.create_connection(('{address}', 7000), timeout=1)"
    command = hosts.command(0, [sys.executable, "-c", code])
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_cut_host_is_reached_by_nobody_until_it_is_healed() -> None:
    server = "import socket, time; s = socket.create_server(('', 7000)); print(1, flush=True)"
    with (
        Hosts(2) as hosts,
        subprocess.Popen(
            hosts.command(1, [sys.executable, "-c", f"{server}; time.sleep(60)"]),
            stdout=subprocess.PIPE,
        ) as listening,
    ):
        assert listening.stdout
        listening.stdout.readline()
        assert reaches(hosts, hosts.address(1))
        hosts.cut(1)
        assert not reaches(hosts, hosts.address(1))
        hosts.heal(1)
        assert reaches(hosts, hosts.address(1))
        assert hosts.pids(1) == [listening.pid]
        hosts.kill(1)
        assert listening.wait(timeout=5) == -9


def test_hosts_of_a_process_that_is_gone_are_removed() -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    name = f"drill{gone.pid}x-0"
    subprocess.run(["ip", "netns", "add", name], check=True)
    with subprocess.Popen(["ip", "netns", "exec", name, "sleep", "60"]) as left:
        time.sleep(0.2)
        clear_abandoned()
        assert left.wait(timeout=5) == -9
    assert not Path("/run/netns", name).exists()
