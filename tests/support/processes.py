"""What a command's processes are and where they listen, as Linux's /proc tells."""

import contextlib
import ipaddress
import re
import struct
from collections.abc import Iterator
from pathlib import Path

_LISTENS = "0A"


def family_of(pid: int) -> list[int]:
    """Returns a process and all that it has started, directly or not, and that still run."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in brackets may hold anything; the state and the parent come after it.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def environment_of(pid: int) -> dict[str, str]:
    """Returns the environment that a process was started with."""
    text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def title_of(pid: int) -> str:
    """Returns a process's command line, or what it has made of it."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()


def listening(pids: list[int]) -> set[tuple[str, int, str]]:
    """Returns where processes take connections over TCP: address, port and the process's title."""
    owners = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if inode := re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink())):
                        owners[inode[1]] = title_of(pid)
    return {
        (address, port, owners[inode]) for address, port, inode in _sockets() if inode in owners
    }


def _sockets() -> Iterator[tuple[str, int, str]]:
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS:
                address, port = fields[1].split(":")
                yield str(_address(address)), int(port, 16), fields[9]


def _address(digits: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    packed = struct.pack(f"={len(words)}I", *words)  # the kernel prints its own byte order
    found = ipaddress.ip_address(packed)
    return getattr(found, "ipv4_mapped", None) or found
