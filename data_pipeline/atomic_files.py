"""Atomic files and folders: readers see all of one or none of it, even if its writer is killed.

Owns the order of writing, `fsync` and renaming, and the names of unfinished files. The leftovers of
a killed writer begin with a dot and end in `.new`. Readers ignore such names, and the folder's
owner removes them.
"""

import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_KILLED_SECONDS = 60.0
"""A file that hasn't been written to for longer has no writer any more."""


@contextmanager
def new_file(path: Path, *, durable: bool = True, replace: bool = True) -> Iterator[BinaryIO]:
    """Yields a file that is renamed to `path` if the context succeeds, replacing an existing one.

    After an error the new file is removed and an existing one is left as it was. The new file gets
    the permissions of the file that it replaces, else the default permissions. With `durable` the
    bytes are on the disk before the rename, and the rename is on the disk when this returns: after
    a power failure, too, either file is whole. If `replace` is false, FileExistsError is raised for
    an existing name. Threads, processes and machines may write the same name concurrently: the last
    rename wins.
    """
    # A unique name: another machine may be writing the same file.
    new = unfinished_name(path)
    try:
        with open(new, "xb") as file:
            if replace:
                _take_permissions(file, path)
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if replace:
            os.replace(new, path)
        else:
            _name_once(new, path)
        if durable:
            sync(path.parent)
    finally:
        with suppress(OSError):  # renamed already, or the disk is gone: the first error is raised
            new.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Writes a whole file with `new_file`; a string is encoded as UTF-8."""
    with new_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Removes the leftovers of writers that were killed more than a minute ago."""
    for leftover in folder.glob(".*.new"):
        with suppress(OSError):  # another process does the same
            if leftover.stat().st_mtime < time.time() - _KILLED_SECONDS:
                leftover.unlink()


def unfinished_name(path: Path) -> Path:
    """A free name for a folder or file that will be renamed to `path` when it is complete."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")


def name_folder(unnamed: Path, path: Path) -> None:
    """Renames a folder; its directory entries are synced before, and its own name afterwards.

    The content of its files must be synced already (`sync_tree`). Raises OSError if the new name is
    that of a file or of a folder that isn't empty.
    """
    sync(unnamed)
    os.rename(unnamed, path)
    sync(path.parent)


def sync_tree(folder: Path) -> None:
    """Syncs everything in a folder to the disk: its content before the folder itself."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Syncs a file's content, or a folder's directory entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_permissions(file: BinaryIO, path: Path) -> None:
    with suppress(OSError):  # no such file, or not permitted to change its mode
        old, new = path.lstat().st_mode, os.fstat(file.fileno()).st_mode
        if stat.S_ISREG(old) and old != new:
            os.fchmod(file.fileno(), stat.S_IMODE(old))


def _name_once(new: Path, path: Path) -> None:
    try:
        os.link(new, path)  # never replaces an existing file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(f"{path} is there already") from None
        os.replace(new, path)
