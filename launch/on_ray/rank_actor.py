"""The process of one rank: an actor that trains in one thread and answers polls in others."""

import ctypes
import faulthandler
import fcntl
import gc
import logging
import os
import socket
import struct
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from launch.failure import Failure, classify
from moetrain.parallel.flight_recorder import unfinished_collectives
from moetrain.redaction import RedactingFormatter, redacted_text
from moetrain.settings import Resolved
from moetrain.train.control import Control, Outcome, RankPlace
from moetrain.train.rank import leave_ranks, run_rank

LEASE_LOOKS = 4  # a lease


@ray.remote(max_restarts=0, max_task_retries=0)
class RankActor:
    """The process of one rank. Training runs in one thread; others answer polls."""

    def __init__(self) -> None:
        self._control = Control()

    def prepare(self, log: str, *, address: str, is_alone: bool, environ: dict[str, str]) -> int:
        """Prepares the process for an attempt; returns its pid."""
        os.environ.update(environ)
        self._control = Control()
        _log_to(log)
        _allow_stacks()
        # By default gloo uses the address of the host's name, which is often the loopback.
        if not is_alone and (interface := _interface_of(address)):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        return os.getpid()

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
            return port

    def run(self, config: Resolved, place: RankPlace) -> Outcome | Failure:
        over = threading.Event()
        lease = threading.Thread(
            target=_end_without_lease,
            args=(self._control, config.launch.lease_seconds, over),
            name="lease",
            daemon=True,
        )
        lease.start()
        try:
            return run_rank(config, place, self._control)
        except BaseException as error:
            print(redacted_text(traceback.format_exc()), file=sys.stderr, flush=True)
            return classify(error)
        finally:
            over.set()

    def clear(self) -> bool:
        """Prepares the process for another attempt, after `run` returned."""
        leave_ranks()
        gc.collect()
        return True

    def collect(self) -> dict[str, Any]:
        return self._control.collect()

    def stop(self) -> None:
        self._control.request_stop()

    def move(self, wanted: bool) -> None:
        self._control.request_move(wanted)

    def collectives(self) -> str:
        """Returns the collectives in flight; apart from `stacks`, because asking a hung device may
        hang."""
        return "".join(f"in flight: {line}\n" for line in unfinished_collectives())

    def stacks(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return "\n".join(
            f"thread {names.get(ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
        )


def _log_to(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    faulthandler.enable(file=sys.stderr)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _end_without_lease(control: Control, seconds: float, over: threading.Event) -> None:
    """Ends this process when its lease expires: it is cut off, and others train."""
    while not over.wait(seconds / LEASE_LOOKS):
        if (unasked := control.unasked_seconds()) > seconds:
            print(
                f"no word from the supervisor for {unasked:.0f} s (launch.lease_seconds="
                f"{seconds:.0f}): this rank ends itself",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _allow_stacks() -> None:
    """Allows this user's other processes to read this one's stacks, which Yama may forbid."""
    pr_set_ptracer, anybody = 0x59616D61, -1
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(pr_set_ptracer, ctypes.c_ulong(anybody), 0, 0, 0)


def _interface_of(address: str) -> str | None:
    """Returns the network interface that has an IPv4 address on this machine."""
    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(probe.fileno(), siocgifaddr, request)[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return None
