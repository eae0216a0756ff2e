"""The per-node monitor: answers the supervisor's questions about a node and its processes.

Imports neither torch nor the rest of moetrain: an agent starts in a second and is never busy.
"""

import http.client
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

STACK_SECONDS = 10.0
WARNING_LOOK_SECONDS = 5.0
METADATA_TIMEOUT_SECONDS = 2.0


class NodeAgent:
    """A per-node monitor; its answer is the node's heartbeat.

    `warnings` names the cloud whose metadata service warns of preemptions.
    """

    def __init__(self, warnings: str = "none") -> None:
        self._warning: str | None = None
        if warnings != "none":
            ask = {"aws": aws_warning, "gcp": gcp_warning}[warnings]
            threading.Thread(target=self._listen, args=(ask,), name="warnings", daemon=True).start()

    def _listen(self, ask: Callable[[], str | None]) -> None:
        while self._warning is None:
            with suppress(OSError, http.client.HTTPException):  # no answer is no warning
                self._warning = ask()
            time.sleep(WARNING_LOOK_SECONDS)

    def ping(self) -> str | None:
        """Returns the warning that this node will be preempted, or None."""
        return self._warning

    def stacks(self, pids: list[int]) -> dict[int, str]:
        """Returns what each process does: its state, and the Python stacks of all its threads.

        Stacks are read from memory, so also from a process that is stopped or holds the
        interpreter's lock. If that isn't allowed, the text says so.
        """
        return {pid: f"{_state(pid)}\n{_stacks(pid)}" for pid in pids}


def aws_warning() -> str | None:
    """Returns EC2's notice of a spot interruption, two minutes before it; None without one.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _request(f"{base}/latest/api/token", method="PUT", headers=lifetime)
    try:
        return "EC2 will interrupt this spot instance: " + _request(
            f"{base}/latest/meta-data/spot/instance-action",
            headers={"X-aws-ec2-metadata-token": token},
        )
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def gcp_warning() -> str | None:
    """Returns Compute Engine's notice of a preemption, 30 seconds before it; None without one.

    https://cloud.google.com/compute/docs/instances/create-use-preemptible
    """
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/preempted"
    taken = _request(url, headers={"Metadata-Flavor": "Google"}).strip().upper() == "TRUE"
    return "Compute Engine will preempt this instance" if taken else None


def _request(url: str, *, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    # The service is local: bypass proxies.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=METADATA_TIMEOUT_SECONDS) as response:
        text: str = response.read().decode()
        return text


def _state(pid: int) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "the process is gone"
    return next(
        (f"process state: {line.split(None, 1)[1]}" for line in lines if "State:" in line), ""
    )


def _stacks(pid: int) -> str:
    beside = Path(sysconfig.get_path("scripts"), "py-spy")
    program = str(beside) if beside.is_file() else shutil.which("py-spy")
    if program is None:
        return f"no stacks: {sys.executable} has no py-spy (it comes with ray[default])"
    try:
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True, text=True, timeout=STACK_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no stacks: py-spy took longer than {STACK_SECONDS:.0f} s"
    return done.stdout if done.returncode == 0 else f"no stacks: {done.stderr.strip()}"
