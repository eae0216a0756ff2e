"""The interface of a remote folder of checkpoints, and which addresses may name one.

Owns the failure messages and the check of an address. Knows no server: `object_folder` and
`disk_folder` do. Leaves the meaning of the files to `checkpoints`.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from moetrain.checkpoint.manifest import CheckpointError
from moetrain.checks import ConfigError, nearest
from moetrain.settings import CheckpointSettings

PROTOCOLS = ("s3", "gs", "file")
SETTING = "checkpoint.upload_to"

Item = TypeVar("Item")


class RemoteUnavailableError(CheckpointError):
    """The server can't be reached or refuses access, whatever it holds."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """The timeout of requests, and how often they are retried."""

    timeout_seconds: float = 120.0
    """A request fails after so long without a byte."""
    num_tries: int = 5
    pause_seconds: float = 1.0
    """The longest pause before the first retry; it doubles with each."""


class RemoteFolder(Protocol):
    """The files below one address, by name; names are `/`-separated and checked by the caller.

    Every method raises CheckpointError, or RemoteUnavailableError where the failure isn't specific
    to a file. Thread-safe.
    """

    @property
    def location(self) -> str:
        """The folder's name in messages."""
        ...

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of all files below a subfolder, by their name in it; empty without a subfolder."""
        ...

    def read(self, name: str) -> bytes:
        """Reads a whole small file; raises FileNotFoundError where there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file atomically."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """As `write`, but only if the file doesn't exist; returns whether it was written."""
        ...

    def upload(self, name: str, path: Path) -> None:
        """Uploads a local file as a stream; it is seen complete or not at all."""
        ...

    def pieces(self, name: str, *, start: int, stop: int) -> Iterator[bytes]:
        """Yields a file's bytes from `start` to `stop`, a few MiB at a time.

        Raises FileNotFoundError; ends early where there are fewer bytes.
        """
        ...

    def delete(self, name: str) -> None:
        """Deletes a file; a missing one is no error."""
        ...

    def forget_uploads(self, below: str) -> None:
        """Deletes leftovers of unfinished uploads in a subfolder, as far as the store allows."""
        ...

    def stop(self) -> None:
        """Makes calls in progress, and every later call, end soon with CheckpointError."""
        ...


def check_url(url: str) -> None:
    """Raises ConfigError for an address that can't be uploaded to; makes no request."""
    protocol, separator, rest = url.partition("://")
    host, _, path = rest.partition("/")

    def refuse(reason: str) -> ConfigError:
        return ConfigError(SETTING, without_credentials(url), reason)

    if "::" in url or url.startswith("pipe:"):
        raise refuse("chained addresses are not taken; give one, such as s3://bucket/runs")
    if not separator or protocol not in PROTOCOLS:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise refuse(
            f"must begin with one of {known}{nearest(protocol, PROTOCOLS)}; what lies in a folder "
            "of this machine is chosen by run.dir"
        )
    if "@" in host or "?" in rest or "#" in rest:
        raise refuse(
            "no user, password or signature may stand in it, since it is logged; set credentials "
            "in the environment (AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, …)"
        )
    if re.search(r"[*\[\]\x00-\x1f\x7f\\]", rest) or {".", ".."} & set(rest.split("/")):
        raise refuse("its path may not have *, [, ], \\, control characters, '.' or '..'")
    if "//" in path or path.startswith("/"):
        raise refuse("an empty name stands in its path; write one slash where there are two")
    if protocol == "file" and (host or not path):
        raise refuse("a folder is given by its absolute path, as file:///mnt/backup")
    if protocol != "file" and not host:
        raise refuse("the bucket is missing; give it as s3://bucket/runs")


def require_mounted(settings: CheckpointSettings) -> None:
    """Raises ConfigError where uploads go to a folder of this machine that doesn't exist."""
    url = settings.upload_to or ""
    if url.startswith("file://") and not Path(url.removeprefix("file://")).is_dir():
        raise ConfigError(
            SETTING, url, "is no folder on this machine: mount or make it, or correct the setting"
        )


def in_parallel(
    work: Callable[[Item], object], items: Iterable[Item], *, num_threads: int = 4
) -> None:
    """Does the work for each item in several threads; raises the first failure.

    The threads are daemons: a program that ends for another reason doesn't wait for a transfer.
    """
    left, failures, lock = list(items)[::-1], list[Exception](), threading.Lock()

    def take() -> None:
        while True:
            with lock:
                if failures or not left:
                    return
                item = left.pop()
            try:
                work(item)
            except Exception as error:
                with lock:
                    failures.append(error)

    threads = [threading.Thread(target=take, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def without_credentials(text: str) -> str:
    """A text without the parts of URLs that may be secret: users, passwords and queries."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    return re.sub(r"\?[^\s'\"]*=[^\s'\"]*", "", text)
