"""Uploads of checkpoints in processes of their own, to be killed.

A fork takes milliseconds where a fresh Python would import for seconds. What forks is a process
with one thread, since those of pytest and of the servers must not be copied halfway.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moetrain.checkpoint.folders import Save, to_delete
from moetrain.checkpoint.manifest import read_manifest
from moetrain.checkpoint.remote.checkpoints import RemoteCheckpoints, open_remote
from moetrain.checkpoint.remote.folder import Retries
from moetrain.checkpoint.remote.uploader import Uploader

PROCESSES = multiprocessing.get_context("forkserver")


def upload(remote: RemoteCheckpoints, folder: Path, *, owner: int | None = None) -> int:
    """Uploads a local checkpoint, by the attempt that saved it unless told otherwise."""
    manifest = read_manifest(folder)
    return remote.upload(folder, manifest, owner=manifest.attempt if owner is None else owner)


def but_two(saves: Collection[Save]) -> list[Save]:
    """All but the newest two."""
    return to_delete(saves, keep_last=2, keep_every=None)


class Uploads:
    """Uploads one checkpoint after the other, each in a process that may be killed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def run(self, address: str, folder: Path, *, meanwhile: Callable[[int], object]) -> int:
        """Uploads and deletes old ones; returns the exit code, the negative of a signal's number.

        `meanwhile` is called with the process' number, when it has begun.
        """
        self._connection.send((address, folder, environment()))
        meanwhile(self._connection.recv())
        return os.waitstatus_to_exitcode(self._connection.recv())


@contextmanager
def uploads() -> Iterator[Uploads]:
    """For the time of a test."""
    here, there = PROCESSES.Pipe()
    server = PROCESSES.Process(target=_fork_for_each, args=(there,))
    server.start()
    there.close()
    try:
        yield Uploads(here)
    finally:
        here.close()
        server.join(30)
        server.kill()


def _fork_for_each(connection: Connection) -> None:
    import s3fs  # noqa: F401  (once, for all)

    while True:
        try:
            address, folder, variables = connection.recv()
        except EOFError:
            return
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.environ.update(variables)
                remote = open_remote(address, run="toy", retries=Retries(num_tries=1))
                upload(remote, folder)
                remote.delete_old(but_two, owner=1)
                code = 0
            finally:
                os._exit(code)
        connection.send(child)
        connection.send(os.waitpid(child, 0)[1])


def end_during_upload(address: str, folder: Path, variables: dict[str, str], began: Any) -> None:
    """A program that ends while its uploader is at work, without closing it."""
    os.environ.update(variables)
    remote = open_remote(address, run="toy")
    uploader = Uploader(remote, owner=1, old=but_two, event=lambda kind, **fields: None)
    uploader.submit(folder, read_manifest(folder))
    assert began.wait(30)


def environment() -> dict[str, str]:
    """What names the server of S3, for another process."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def kill(process: int) -> None:
    """As a machine that loses its power would end it."""
    os.kill(process, signal.SIGKILL)
