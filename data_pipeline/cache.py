"""A bounded folder of downloaded files, shared by all processes of a machine.

Owns where the files are, who downloads one, which are deleted to make room, and how a full disk is
handled. Leaves downloading and hashing to `storage`.

A file's name is the SHA-256 of its bytes, so that folders with equal shards share them. A file is
renamed to it once its bytes are hashed and on disk. From then on only its size is checked: the
reader checks each document's CRC-32 anyway, and hashing 50 GiB again at every start would take
minutes.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_pipeline.locks import LockHeldError, is_at, locked
from data_pipeline.quantities import binary_size
from data_pipeline.settings import DataError, UnavailableError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

_PART = ".part"
_SECONDS_BETWEEN_LOOKS = 0.1


class _Entry(NamedTuple):
    used_at: int
    size: int
    path: Path


class FileCache:
    """Files by the SHA-256 of their bytes, `max_bytes` in total at most.

    The least recently used file is deleted first. Deleting is always safe: a file that is open or
    mapped stays readable, since Linux keeps its bytes until the last user closes it.

    Raises DataError if the folder can't be created.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnavailableError(
                f"data.cache.dir={str(folder)!r} can't be a folder: {error.strerror}; name "
                "another with data.cache.dir=DIR"
            ) from error

    def open(
        self, sha256: str, *, size: int, name: str, write: Callable[[BinaryIO], None]
    ) -> BufferedReader:
        """The file with these bytes, open for reading; `write` provides them if it isn't cached.

        If several processes need the same file, one writes and the others wait. A writer that dies
        leaves nothing that the others would wait for. `name` is for messages.

        Raises DataError if there is no room for the file, and what `write` raises.
        """
        if size <= 0 or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise DataError(
                f"{name} can't have {size} bytes and SHA-256 {sha256!r}; build it again"
            )
        if size > self._max_bytes:
            raise UnavailableError(
                f"{name} has {size} bytes, more than the whole cache, {self._max_bytes}; raise "
                "data.cache.max_gib, or build the shards again with a smaller shard_tokens"
            )
        # Repeats only if the file is deleted to make room for others before it is opened.
        while True:
            if (found := self._found(sha256, size)) is not None:
                return found
            with self._own_part(sha256) as part:
                if (found := self._found(sha256, size)) is not None:
                    return found
                self._fill(part, sha256, size=size, name=name, write=write)

    def _found(self, sha256: str, size: int) -> BufferedReader | None:
        try:
            file = (self._folder / sha256).open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            return None
        with suppress(PermissionError):  # another user's file
            # The kernel's own timestamp would have a resolution of milliseconds.
            os.utime(file.fileno(), ns=(time.time_ns(), time.time_ns()))
        return file

    @contextmanager
    def _own_part(self, sha256: str) -> Iterator[BinaryIO]:
        """The unfinished file, locked; afterwards it is renamed or deleted."""
        path = self._folder / f"{sha256}{_PART}"
        with locked(path, mode=0o644) as file:
            try:
                yield file
            finally:
                if is_at(file, path):
                    path.unlink()

    def _fill(
        self,
        part: BinaryIO,
        sha256: str,
        *,
        size: int,
        name: str,
        write: Callable[[BinaryIO], None],
    ) -> None:
        path = self._folder / f"{sha256}{_PART}"
        while True:
            try:
                self._reserve(part, path, size)
                write(part)
                part.flush()
                os.fsync(part.fileno())  # a machine crash must not leave zeros in the file
                path.rename(self._folder / sha256)
                return
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                os.ftruncate(part.fileno(), 0)
                if not self._evict(path, num_bytes=1):
                    disk = os.statvfs(self._folder)
                    raise UnavailableError(
                        f"{self._folder} has no room for {name}: {binary_size(size)} needed, "
                        f"{binary_size(disk.f_bavail * disk.f_frsize)} free; free some, or name a "
                        "folder on a larger disk with data.cache.dir=DIR"
                    ) from error

    def _reserve(self, part: BinaryIO, path: Path, size: int) -> None:
        """Allocates the file's full size on disk, within the bound of the cache."""
        while True:
            with locked(self._folder / "lock"):
                used = sum(entry.size for entry in self._entries() if entry.path != path)
                excess = used + size - self._max_bytes
                if excess <= 0 or self._evict(path, num_bytes=excess):
                    # Reserve all of it now, so that the disk can't become full during a download.
                    os.posix_fallocate(part.fileno(), 0, size)
                    return
            # The remaining files are being written by others, and can be deleted after that.
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _evict(self, own: Path, *, num_bytes: int) -> bool:
        """Deletes the least recently used files; returns whether they had `num_bytes` in total."""
        for entry in self._entries():
            if num_bytes <= 0:
                break
            if entry.path != own and entry.size and _deleted(entry.path):
                num_bytes -= entry.size
        return num_bytes <= 0

    def _entries(self) -> list[_Entry]:
        """All files of the cache, the least recently used first."""
        entries = []
        for path in self._folder.iterdir():
            if re.fullmatch(f"[0-9a-f]{{64}}({_PART})?", path.name):
                with suppress(FileNotFoundError):  # renamed or deleted in the meantime
                    status = path.stat()
                    entries.append(_Entry(status.st_mtime_ns, status.st_size, path))
        return sorted(entries)


def _deleted(path: Path) -> bool:
    """Deletes a file, unless a living process is writing it; returns whether it did."""
    try:
        with locked(path, wait=False, create=False) if path.suffix == _PART else nullcontext():
            path.unlink()
    except (LockHeldError, FileNotFoundError):
        return False
    return True
