"""Locks between the processes and threads of a machine: files with `flock`.

Owns who holds a lock and who waits. A process that dies leaves nothing behind, because the kernel
releases its locks. The holder of a file's lock may rename or delete the file. docs/libraries.md
says why this isn't the library filelock.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_LONGEST_ID = 20


class LockHeldError(Exception):
    """Another process holds a lock; `owner` is its id if known, else `unknown`."""

    def __init__(self, path: Path, *, owner: str) -> None:
        super().__init__(f"process {owner} holds the lock {path}")
        self.owner = owner


@contextmanager
def locked(
    path: Path,
    *,
    wait: bool = True,
    waiting: Callable[[], object] = lambda: None,
    create: bool = True,
    optional: bool = False,
    mode: int = 0o666,
) -> Iterator[BinaryIO]:
    """Holds the lock of a file within the context; yields the file, for reading and writing.

    The file and its folder are created if they are missing; if `create` is false, FileNotFoundError
    is raised instead. `waiting` is called once if another process holds the lock; if `wait` is
    false, LockHeldError is raised instead. If the file system has no locks, OSError is raised, or
    with `optional` the file is treated as locked.
    """
    while True:
        file, has_lock = _opened(path, create=create, mode=mode), False
        try:
            has_lock = _lock(file, path, wait=wait, waiting=waiting, optional=optional)
            # The previous holder may have renamed or deleted the file: then it locks nothing.
            if is_at(file, path):
                yield file
                return
        finally:
            if has_lock:  # closing isn't enough if a process forked meanwhile has the file open
                fcntl.flock(file, fcntl.LOCK_UN)
            file.close()


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Holds the lock of a file that has this process's id in it; raises LockHeldError at once."""
    with locked(path, wait=False) as file:
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), str(os.getpid()).encode(), 0)
        yield


def owner_of(path: Path) -> str | None:
    """Returns the id of the process that holds a lock by `owned`, or None.

    Writes nothing and creates no file, so that read-only commands can call it.
    """
    with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _id_in(file)
        fcntl.flock(file, fcntl.LOCK_UN)
    return None


def is_at(file: BinaryIO, path: Path) -> bool:
    """Whether a path still refers to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _opened(path: Path, *, create: bool, mode: int) -> BinaryIO:
    while True:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.fdopen(os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), mode), "r+b")
        except FileNotFoundError:
            if not create:
                raise
            # The previous holder has just removed the folder together with the file.


def _lock(
    file: BinaryIO, path: Path, *, wait: bool, waiting: Callable[[], object], optional: bool
) -> bool:
    """Takes the lock; returns whether there is one to release."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise LockHeldError(path, owner=_id_in(file)) from None
        waiting()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if not optional or error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _id_in(file: BinaryIO) -> str:
    return os.pread(file.fileno(), _LONGEST_ID, 0).decode(errors="replace") or "unknown"
