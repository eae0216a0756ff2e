"""A Ray head of its own for a test: own ports and own folder, and every process of it ended."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 90


@dataclass(frozen=True, kw_only=True)
class RayHead:
    """A head node that jobs can be submitted to; all but its dashboard is on the loopback."""

    address: str
    """host:port, what `ray.init` takes."""
    dashboard: str
    """http://host:port, what the job client takes."""
    tmp: Path
    process: int
    env: dict[str, str]
    """The environment of a command that is to find this head, as on its machine."""


@contextlib.contextmanager
def ray_head(*, num_cpus: int, dashboard_host: str = "127.0.0.1", **env: str) -> Iterator[RayHead]:
    """Runs a head node with a dashboard while the context lasts.

    `python` in its jobs is this one, as in an environment that was activated before `ray start`.
    """
    gcs, dashboard, agent, client = _free_ports(4)
    tmp = Path(tempfile.mkdtemp(prefix="rh", dir="/tmp"))  # short: sockets live in it
    token = tmp / "token"
    token.write_text(secrets.token_hex(32))
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": str(tmp),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        **env,
    }
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
         "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}",
         f"--dashboard-host={dashboard_host}", f"--dashboard-agent-listen-port={agent}",
         f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0",
         f"--num-cpus={num_cpus}", "--num-gpus=0", "--object-store-memory=100000000",
         "--include-log-monitor=false"],
        env=environment, stdout=(tmp / "start.log").open("w"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        current = tmp / "ray/ray_current_cluster"
        _await_jobs(f"http://{dashboard_host}:{dashboard}", head, tmp / "start.log", current)
        yield RayHead(
            address=current.read_text().strip(),
            dashboard=f"http://{dashboard_host}:{dashboard}",
            tmp=tmp,
            process=head.pid,
            env=environment,
        )
    finally:
        end_head(head)
        shutil.rmtree(tmp, ignore_errors=True)


def end_head(head: subprocess.Popen[bytes]) -> None:
    """Ends a head and all processes that it started."""
    family = descendants(head.pid)
    head.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=15)
    for pid in (*family, head.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait()


def descendants(pid: int) -> list[int]:
    """Returns the processes that a process has started, and those that they have."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int(
                (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def _await_jobs(dashboard: str, head: subprocess.Popen[bytes], log: Path, current: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert head.poll() is None, f"the Ray head ended: {log.read_text()}"
        if current.exists() and _answers(f"{dashboard}/api/jobs/"):
            return
        time.sleep(0.2)
    raise AssertionError(f"no Ray head within {START_SECONDS} s: {log.read_text()}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 401  # it wants the token that Ray's own clients send
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
