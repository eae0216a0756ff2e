"""Locks between the processes and threads of a machine: files under `flock`.

Owns who has a lock, who waits, and what a process that died leaves: nothing, for the kernel frees
its locks. A file may be renamed or deleted by whoever holds its lock. docs/libraries.md says why
this isn't the library filelock.
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
    """Another process holds a lock; `owner` is its id where it is known, else `unknown`."""

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
    """Holds the lock of a file while the context lasts; yields the file, for reading and writing.

    The file and its folder are made where they are missing, unless `create` is false: then
    FileNotFoundError. `waiting` is called once if another process holds the lock; without `wait`
    LockHeldError is raised instead. Where the file system has no locks, OSError is raised, or with
    `optional` the file is taken for locked.
    """
    while True:
        file, has_lock = _opened(path, create=create, mode=mode), False
        try:
            has_lock = _lock(file, path, wait=wait, waiting=waiting, optional=optional)
            # Who had the lock before may have renamed or deleted the file: it locks nothing then.
            if is_at(file, path):
                yield file
                return
        finally:
            if has_lock:  # closing alone keeps it where a process forked meanwhile has the file too
                fcntl.flock(file, fcntl.LOCK_UN)
            file.close()


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Holds the lock of a file in which this process's id then stands; LockHeldError at once."""
    with locked(path, wait=False) as file:
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), str(os.getpid()).encode(), 0)
        yield


def owner_of(path: Path) -> str | None:
    """Returns the id of the process that holds a lock by `owned`, None where none does.

    Writes nothing and makes no file, so that it may be asked by who only looks.
    """
    with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _id_in(file)
        fcntl.flock(file, fcntl.LOCK_UN)
    return None


def is_at(file: BinaryIO, path: Path) -> bool:
    """Whether a path still leads to an open file."""
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
            # Who had the lock has just removed the folder with it.


def _lock(
    file: BinaryIO, path: Path, *, wait: bool, waiting: Callable[[], object], optional: bool
) -> bool:
    """Takes the lock; returns whether there is one to give back."""
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
