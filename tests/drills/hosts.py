"""Several hosts on one machine: network namespaces on a bridge, and a Ray cluster over them.

Owns namespaces, their links and the processes in them. Needs root and iproute2. The hosts share
the machine's disk, cores and clock. Each has its own network, so that a link can be cut, and all
processes of a host can be ended as in a power failure.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_NAME = re.compile(r"drill(\d+)x\w*-\w+")

# Asks a cluster's head, in a process of its own: the one that drills isn't on the hosts' network.
_NODES = """
import json, sys
import ray
from ray._private.worker import global_worker

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
leaving = set(global_worker.gcs_client.get_draining_nodes())
nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
print("nodes", json.dumps([(n["NodeManagerAddress"], n["NodeID"]) for n in nodes]))
"""

# Ray checks its nodes every second instead of every ten; a node counts as lost after about 5 s.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
PORT = 6379
START_TRIES = 3
OBJECT_STORE_BYTES = 80_000_000  # Ray's minimum is 75 MiB


def no_hosts_because() -> str | None:
    """Returns why there can be no hosts on this machine; None where there can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed (no command `ip`)"
    name = f"drill{os.getpid()}x-try"
    tried = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return f"`ip netns add` is not permitted: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


class Hosts:
    """Hosts of this process; their names and addresses are its own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._prefix = f"drill{os.getpid()}x{secrets.token_hex(2)}"

    def __enter__(self) -> "Hosts":
        clear_abandoned()
        switch = self._name("switch")
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for n in range(self.count):
            host = self._name(n)
            _ip("netns", "add", host)
            _ip("-n", host, "link", "set", "lo", "up")
            _ip(
                "-n", switch, "link", "add", f"port{n}", "type", "veth",
                "peer", "name", "eth0", "netns", host,
            )  # fmt: skip
            _ip("-n", switch, "link", "set", f"port{n}", "master", "br0", "up")
            _ip("-n", host, "addr", "add", f"{self.address(n)}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in _namespaces():
            if name.startswith(f"{self._prefix}-"):
                _remove(name)

    def address(self, n: int) -> str:
        """Returns a host's address."""
        # Nothing leads out of the switch, so that another's addresses wouldn't matter; unlike ones
        # are told apart in logs.
        pid = os.getpid()
        return f"10.{200 + pid // 250 % 50}.{pid % 250}.{n + 1}"

    def command(self, n: int, arguments: Sequence[str]) -> list[str]:
        """Returns the command that runs another on a host; it keeps its process id.

        Each host has one core of this machine, in turn, so that it computes with one thread.
        """
        cores = sorted(os.sched_getaffinity(0))
        core = cores[n % len(cores)]
        return ["ip", "netns", "exec", self._name(n), "taskset", "-c", str(core), *arguments]

    def cut(self, n: int) -> None:
        """Takes a host's link down."""
        _ip("-n", self._name("switch"), "link", "set", f"port{n}", "down")

    def heal(self, n: int) -> None:
        """Brings a host's link up again."""
        _ip("-n", self._name("switch"), "link", "set", f"port{n}", "up")

    def pids(self, n: int) -> list[int]:
        """Returns the processes on a host."""
        return _pids(self._name(n))

    def kill(self, n: int) -> None:
        """Ends all processes on a host at once, as if its power were gone."""
        _kill_all(self._name(n))

    def _name(self, which: int | str) -> str:
        return f"{self._prefix}-{which}"


class Cluster:
    """A Ray cluster over hosts, the head on host 0. Ends with what runs on it."""

    def __init__(
        self, hosts: Hosts, *, places: Sequence[int], environment: Mapping[str, str], log: Path
    ) -> None:
        """`places` are the ranks that each host has room for, the head's first."""
        self.hosts, self._places, self._log = hosts, list(places), log
        # Short, for the names of sockets end in it and Linux allows them 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="drill-", dir="/tmp"))
        self.environment = {
            **environment,
            **HEALTH_CHECKS,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
        }

    def __enter__(self) -> "Cluster":
        try:
            self._start_all(list(range(len(self._places))))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for n in range(len(self._places)):
            self.hosts.kill(n)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def address(self) -> str:
        """Where the head listens."""
        return f"{self.hosts.address(0)}:{PORT}"

    def repair(self) -> None:
        """Restores all links, and restarts Ray on hosts that have lost it or are being drained.

        As a service manager would. If the head is lost, all hosts are restarted.
        """
        for n in range(len(self._places)):
            self.hosts.heal(n)
        there = self.nodes() if self.hosts.pids(0) else {}
        if self.hosts.address(0) not in there:
            there = {}
        lost = [n for n in range(len(self._places)) if self.hosts.address(n) not in there]
        for n in lost:
            self.hosts.kill(n)
        self._start_all(lost)

    def nodes(self) -> dict[str, str]:
        """Returns the living nodes' ids by address, of those that aren't being drained."""
        said = self.run(0, [sys.executable, "-c", _NODES, self.address], seconds=60)
        # Ray's own warnings, of nodes that are lost, can stand beside it.
        (line,) = [line for line in said.splitlines() if line.startswith("nodes ")]
        return dict(json.loads(line.removeprefix("nodes ")))

    def drain(self, node: str) -> None:
        """Announces, as a cloud would, that a node will be preempted in half a minute."""
        self.run(
            0,
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
                f"--address={self.address}",
                f"--node-id={node}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=the drill takes it away",
                "--deadline-remaining-seconds=30",
            ],
            seconds=60,
        )

    def _start_all(self, numbers: Sequence[int]) -> None:
        """Starts the head, if it is among them, and then the others at the same time."""
        if 0 in numbers:
            self.start(0)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.start, [n for n in numbers if n]))

    def start(self, n: int) -> None:
        """Starts a host's part of Ray.

        Ray gives a node half a minute, which is too little on a machine that does much else.
        """
        for _ in range(START_TRIES - 1):
            with contextlib.suppress(AssertionError):
                return self._start(n)
            self.hosts.kill(n)
        self._start(n)

    def _start(self, n: int) -> None:
        role = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if n:
            role = [f"--address={self.address}"]
        own = self._folder / f"host{n}"
        started = subprocess.run(
            self.hosts.command(
                n,
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", *role),
                    f"--node-ip-address={self.hosts.address(n)}",
                    f"--num-cpus={self._places[n]}",
                    f"--object-store-memory={OBJECT_STORE_BYTES}",
                    f"--temp-dir={own}",
                    "--disable-usage-stats",
                ],
            ),
            env=self.environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        with self._log.open("a") as log:
            log.write(f"host {n}:\n{started.stdout}{started.stderr}\n")
        assert started.returncode == 0, f"no Ray on host {n}: {started.stdout}{started.stderr}"

    def run(self, n: int, arguments: Sequence[str], *, seconds: float) -> str:
        """Runs a command on a host; returns what it printed."""
        done = subprocess.run(
            self.hosts.command(n, arguments),
            env=self.environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout


def clear_abandoned() -> None:
    """Removes the hosts of processes that are gone, with all that still runs on them."""
    for name in _namespaces():
        if (match := _NAME.fullmatch(name)) and not Path("/proc", match[1]).exists():
            _remove(name)


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in listed.stdout.splitlines() if line.strip()]


def _remove(name: str) -> None:
    _kill_all(name)
    _ip("netns", "del", name)


def _pids(name: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", name).split()]


def _kill_all(name: str) -> None:
    until = time.monotonic() + 10
    while pids := _pids(name):  # again and again: what is being forked isn't listed yet
        assert time.monotonic() < until, f"{name}: processes {pids} don't end"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
