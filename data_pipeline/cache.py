"""A bounded folder of downloaded files, shared by all processes of a machine.

Owns where the files lie, who downloads one, which are deleted to make room, and what a full disk
means. Leaves the downloading and the hashing to `storage`.

A file's name is the SHA-256 of its bytes, so that folders with equal shards share them. It gets
that name by a rename, once its bytes were hashed and are on disk. From then on it is trusted by
its size: the reader checks each document's CRC-32 anyway, and hashing 50 GiB again at every start
would cost minutes.
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
    """Files by the SHA-256 of their bytes, together no more than `max_bytes`.

    The file used longest ago is deleted first. One that is open or mapped stays readable to who
    has it, since Linux keeps the bytes until the last of them lets go: deleting is always safe.

    Raises DataError where the folder can't be made.
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
        """The file with these bytes, open for reading; `write` brings them where it isn't there.

        Of several processes that want the same file, one writes and the others wait; one that
        dies meanwhile leaves nothing that they would wait for. `name` is for messages.

        Raises DataError where the file can't have room, and what `write` raises.
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
        # More than once only where the file is deleted for others' files before it is opened.
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
        with suppress(PermissionError):  # another user's
            # The clock that the kernel would take by itself moves in steps of milliseconds.
            os.utime(file.fileno(), ns=(time.time_ns(), time.time_ns()))
        return file

    @contextmanager
    def _own_part(self, sha256: str) -> Iterator[BinaryIO]:
        """The unfinished file, locked; it is gone afterwards, renamed or deleted."""
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
                os.fsync(part.fileno())  # a crash of the machine must not leave zeros behind
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
        """Gives the unfinished file its full size, on disk and within the bound."""
        while True:
            with locked(self._folder / "lock"):
                used = sum(entry.size for entry in self._entries() if entry.path != path)
                excess = used + size - self._max_bytes
                if excess <= 0 or self._evict(path, num_bytes=excess):
                    # Room for all of it now, rather than none in the middle of a download.
                    os.posix_fallocate(part.fileno(), 0, size)
                    return
            # What is left is being written by others, and can be deleted after that.
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _evict(self, own: Path, *, num_bytes: int) -> bool:
        """Deletes the files used longest ago, `num_bytes` together; whether there were as many."""
        for entry in self._entries():
            if num_bytes <= 0:
                break
            if entry.path != own and entry.size and _deleted(entry.path):
                num_bytes -= entry.size
        return num_bytes <= 0

    def _entries(self) -> list[_Entry]:
        """All files of the cache, the one used longest ago first."""
        entries = []
        for path in self._folder.iterdir():
            if re.fullmatch(f"[0-9a-f]{{64}}({_PART})?", path.name):
                with suppress(FileNotFoundError):  # renamed or deleted meanwhile
                    status = path.stat()
                    entries.append(_Entry(status.st_mtime_ns, status.st_size, path))
        return sorted(entries)


def _deleted(path: Path) -> bool:
    """Deletes a file, unless a living process is writing it; whether it did."""
    try:
        with locked(path, wait=False, create=False) if path.suffix == _PART else nullcontext():
            path.unlink()
    except (LockHeldError, FileNotFoundError):
        return False
    return True
