"""Hosts on this machine: each has a network, processes, a name and Ray's folders of its own.

Network namespaces joined by a bridge carry the traffic; a process namespace of its own lets a host
run `ray stop`, which ends every Ray process that it sees. Only root can make them.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"


def missing(*programs: str) -> str | None:
    """Returns why hosts can't be made here, or None."""
    if os.geteuid() != 0:
        return "making hosts of namespaces needs root"
    absent = [
        p for p in ("ip", "unshare", *programs) if shutil.which(p, path=search_path()) is None
    ]
    if absent:
        return f"needs {', '.join(absent)}"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "this machine does not let root make namespaces"


def search_path() -> str:
    """Returns where programs of the system are, those of the administrator too."""
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


@dataclass(frozen=True)
class Host:
    """One of them. Its processes end with it."""

    name: str
    address: str
    init: int

    def inside(self, *command: str, folder: Path = Path("/")) -> list[str]:
        """Returns the command line that runs a command there, in a folder."""
        entered = ["--net", "--pid", "--mount", "--uts", "--ipc", f"--wd={folder}"]
        return ["nsenter", "--target", str(self.init), *entered, *command]


@contextlib.contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """Makes hosts, named h0, h1, …, and takes them away again with all that runs on them."""
    prefix = f"mt{os.getpid()}"
    switch = f"{prefix}-switch"
    started: list[subprocess.Popen[bytes]] = []
    made: list[Host] = []
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for index in range(number):
            netns, port = f"{prefix}-h{index}", f"port{index}"
            _ip("netns", "add", netns)
            _ip("-n", netns, "link", "set", "lo", "up")
            _ip("link", "add", "eth0", "netns", netns, "type", "veth",
                "peer", "name", port, "netns", switch)  # fmt: skip
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            address = f"{NETWORK}.{index + 1}"
            _ip("-n", netns, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", netns, "link", "set", "eth0", "up")
            made.append(_boot(f"h{index}", address, netns=netns, started=started))
        yield made
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)  # --kill-child: and all that runs in there
            process.wait()
        for index in range(len(made)):
            _ip("netns", "del", f"{prefix}-h{index}")
        _ip("netns", "del", switch)


def _boot(name: str, address: str, *, netns: str, started: list[subprocess.Popen[bytes]]) -> Host:
    """Starts the first process of a host: it reaps the others, and its end is theirs."""
    private = [Path.home() / ".ray", Path("/tmp/ray")]  # the user's token, Ray's sockets and logs
    for folder in private:
        folder.mkdir(exist_ok=True)
    setup = (
        "".join(f"mount -t tmpfs tmpfs {folder} && " for folder in private)
        + f"hostname {name} && echo $$ && while true; do sleep 3600 & wait $!; done"
    )
    process = subprocess.Popen(
        ["ip", "netns", "exec", netns, "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork",
         "--kill-child", "--mount-proc", "bash", "-c", setup],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n", f"host {name} did not start"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return Host(name, address, int(children[0]))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
