"""A process that has imported what trains, and forks a process for each trial of a sweep.

A trial of a few steps would otherwise spend its time on importing. The server imports, and computes
nothing: no thread of torch's or OpenMP's runs in it, no random number is drawn and no device is
touched, so that a forked process is as good as a new one. What a trial does to its process ends
with it. `TrialServer` is the sweep's side; `main` runs the other, in a process of its own.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn, Protocol, cast

from moetrain.exit_codes import FAILED

# What a training command imports in the end: neither its own module, which is run, nor Ray, which
# changes sys.path. What Ray imports is here.
_IMPORTED = (
    "moetrain.command",
    "moetrain.training",
    "moetrain.report",
    "launch.inline",
    "grpc",
    "requests",
    "matplotlib.backends.backend_svg",
    "torch._dynamo",
)
_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# moetrain first, which finds its own `launch` whatever a user's folder has.
_SERVER = "import moetrain; from launch.sweeps.trial_server import main; main()"
_LENGTH = struct.Struct("!Q")
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


class TrialServer:
    """The sweep's side: starts trials, and learns how they end."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, command: Sequence[str], *, environ: Mapping[str, str], output: int | None, group: int
    ) -> "ServedTrial":
        """Starts the training command with some words in a process of its own.

        It writes to the descriptor `output`, or where the sweep writes. `group` is its process
        group, 0 for one of its own. It stops, after a checkpoint, when the sweep ends.
        """
        if self._channel is None:
            self._begin()
        streams = (1, 2) if output is None else (output, output)
        wanted = {"words": list(command), "environ": dict(environ), "group": group}
        try:
            pid = self._ask(wanted, streams)
        except OSError:  # it was killed: trials that it had started have stopped with it
            self.close()
            self._begin()
            pid = self._ask(wanted, streams)
        return ServedTrial(self, pid)

    def ended(self, pid: int) -> int | None:
        """Returns a trial's exit code, None while it runs; below zero: the signal that ended it."""
        try:
            return cast("int | None", self._ask({"pid": pid}))
        except OSError:
            return FAILED

    def close(self) -> None:
        """Ends the server; trials must have ended before."""
        if self._channel is not None and self._process is not None:
            self._channel.close()
            self._process.wait()
        self._channel = self._process = None

    def _begin(self) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C is for the trials.
                process_group=0,
            )

    def _ask(self, message: Any, descriptors: Sequence[int] = ()) -> Any:
        if self._channel is None:
            raise ConnectionError("the server of trials is gone")
        _send(self._channel, message, descriptors)
        return _receive(self._channel)[0]


class ServedTrial:
    """A trial's process, with the part of `subprocess.Popen` that a sweep uses."""

    def __init__(self, server: TrialServer, pid: int) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns its exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ended(self.pid)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Sends it a signal while it runs."""
        if self.returncode is None:  # else its number may be another's
            with suppress(ProcessLookupError):
                os.kill(self.pid, signum)


class TrialProcess(Protocol):
    """A trial's process, whoever started it."""

    returncode: int | None

    def poll(self) -> int | None:
        """Returns its exit code, None while it runs."""

    def send_signal(self, signum: int) -> None:
        """Sends it a signal while it runs."""


def serve(channel: socket.socket) -> None:
    """Answers a sweep until it ends."""
    # A trial gets what is sent to it before it listens, once it does; the server never.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    for name in _IMPORTED:
        import_module(name)
    gc.freeze()  # a collection in a trial would copy all of it
    while True:
        try:
            message, descriptors = _receive(channel)
        except OSError:
            return
        if "pid" in message:
            found, status = os.waitpid(message["pid"], os.WNOHANG)
            _send(channel, os.waitstatus_to_exitcode(status) if found else None)
            continue
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            channel.close()
            _become(message, descriptors, server=server)
        for descriptor in descriptors:
            os.close(descriptor)
        _send(channel, pid)


def _become(wanted: Mapping[str, Any], streams: Sequence[int], *, server: int) -> NoReturn:
    """Runs a trial in this new process, and ends it as the interpreter would."""
    code = FAILED
    try:
        with suppress(OSError):  # a group that has ended
            os.setpgid(0, wanted["group"])
        _stop_with(server)
        for number, descriptor in enumerate(streams, start=1):
            os.dup2(descriptor, number)
        for descriptor in set(streams):
            os.close(descriptor)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(wanted["environ"])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        _draw_seeds()
        sys.argv[:] = ["moetrain", *wanted["words"]]
        code = _run()
        threading._shutdown()  # type: ignore[attr-defined] # waits, as the interpreter does at its end
        atexit._run_exitfuncs()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _draw_seeds() -> None:
    """Draws new seeds for the global generators, as a new process does; Python's own does itself.

    Training uses none of them.
    """
    import numpy as np
    import torch

    torch.seed()
    np.random.seed()


def _run() -> int:
    """Runs the training command, and returns its exit code."""
    try:
        runpy.run_module("moetrain", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return FAILED
    except Exception:
        traceback.print_exc()
        return FAILED
    return 0


def _stop_with(server: int) -> None:
    """Makes the kernel stop this trial, after a checkpoint, when the server ends with the sweep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != server:
            os.kill(os.getpid(), signal.SIGTERM)


def _send(channel: socket.socket, message: Any, descriptors: Sequence[int] = ()) -> None:
    body = json.dumps(message).encode()
    socket.send_fds(channel, [_LENGTH.pack(len(body))], list(descriptors))
    channel.sendall(body)


def _receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """Returns a message and the descriptors that came with it; raises OSError at the end."""
    head, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, 2)
    while len(head) < _LENGTH.size:
        head += _some(channel, _LENGTH.size - len(head))
    (length,) = _LENGTH.unpack(head)
    body = b""
    while len(body) < length:
        body += _some(channel, length - len(body))
    return json.loads(body), list(descriptors)


def _some(channel: socket.socket, most: int) -> bytes:
    part = channel.recv(most)
    if not part:
        raise ConnectionError("the other side has ended")
    return part


def main() -> None:
    """Runs the server; its argument is the descriptor of its side's socket."""
    if sys.path[0] == "":
        sys.path[0] = os.getcwd()  # as `python -m` has it, which a trial is
    serve(socket.socket(fileno=int(sys.argv[1])))
