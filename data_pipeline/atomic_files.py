"""Files and folders that are seen whole or not at all, whenever their writer is killed.

Owns the order of writing, `fsync` and renaming, and the names of what is being written. What a
killed writer leaves has a name with a dot before and `.new` behind; readers pass over such names,
and who owns a folder removes them.
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
"""What hasn't been written to for longer has no writer any more."""


@contextmanager
def new_file(path: Path, *, durable: bool = True, replace: bool = True) -> Iterator[BinaryIO]:
    """Yields a file that takes its name when the context ends well, in place of one that has it.

    After an error it is gone, and what had the name is as it was. It gets the permissions of the
    file that it replaces, else those of any new file. With `durable` the bytes are on the disk
    before the name leads to them, and the name when this returns: also a power cut leaves either
    file whole. Without `replace` FileExistsError is raised where the name is taken. Several
    threads, processes and machines may write one name at once: the last one's file stays.
    """
    # A name of its own: another writer of the same file may be anywhere.
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
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
        with suppress(OSError):  # it has its name, or the disk has gone: that error is raised
            new.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Writes a whole file by `new_file`; a text in UTF-8."""
    with new_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Removes what writers in a folder left that were killed more than a minute ago."""
    for leftover in folder.glob(".*.new"):
        with suppress(OSError):  # another process does the same
            if leftover.stat().st_mtime < time.time() - _KILLED_SECONDS:
                leftover.unlink()


def name_folder(unnamed: Path, path: Path) -> None:
    """Gives a folder its name, with the names in it on the disk before and its own afterwards.

    The content of its files must be there already (`sync_tree`). OSError where the name is that of
    a file, or of a folder with something in it.
    """
    sync(unnamed)
    os.rename(unnamed, path)
    sync(path.parent)


def sync_tree(folder: Path) -> None:
    """Brings everything in a folder to the disk, what is in a folder before the folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Brings a file's content or the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_permissions(file: BinaryIO, path: Path) -> None:
    with suppress(OSError):  # there is none, or they are not ours to give
        old, new = path.lstat().st_mode, os.fstat(file.fileno()).st_mode
        if stat.S_ISREG(old) and old != new:
            os.fchmod(file.fileno(), stat.S_IMODE(old))


def _name_once(new: Path, path: Path) -> None:
    try:
        os.link(new, path)  # which never replaces
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if os.path.lexists(path):
            raise FileExistsError(f"{path} is there already") from None
        os.replace(new, path)
