"""The lock in a run folder: one command on a machine trains a run at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.folders import named_folder
from moetrain.checks import ConfigError


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Makes a run folder and locks it against other commands on this machine; a kill releases the
    lock.

    Raises ConfigError if another command holds it. On other machines the attempt number is the
    fence.
    """
    with named_folder(run_dir):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 20).decode() or "unknown"
        os.close(lock)
        raise _in_use(run_dir, holder=holder) from None
    try:
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        os.close(lock)  # and with it the lock


def require_free(run_dir: Path) -> None:
    """Raises ConfigError if another command on this machine trains a run."""
    try:
        lock = os.open(run_dir / "lock", os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(run_dir, holder=os.read(lock, 20).decode() or "unknown") from None
    finally:
        os.close(lock)


def _in_use(run_dir: Path, *, holder: str) -> ConfigError:
    """Returns the error for a run that another process is training."""
    return ConfigError(
        "run.name",
        run_dir.name,
        f"process {holder} is training this run: stop it first, or use another run.name",
    )
