"""A remote folder that is mounted on this machine: another disk, or a network file system.

Each file in it is seen complete or not at all, whenever the writer is killed.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_pipeline.atomic_files import new_file
from moetrain.checkpoint.manifest import CheckpointError
from moetrain.checkpoint.remote.folder import SETTING, RemoteUnavailableError

_PIECE_BYTES = 8 * 2**20


class DiskFolder:
    """The files of a folder below `root`, which must exist: a missing mount isn't written into."""

    def __init__(self, root: Path, below: str) -> None:
        self._root, self._folder = root, root / below
        self._stopped = threading.Event()

    @property
    def location(self) -> str:
        """The folder's address."""
        return f"file://{self._folder}"

    def sizes(self, below: str = "") -> dict[str, int]:
        """Walks the folder; leftovers of killed writers are listed too, by names with a dot."""
        with self._told():
            folder, found = self._folder / below, {}
            for parent, _, names in os.walk(folder, onerror=_raise):
                for name in names:
                    path = Path(parent, name)
                    with suppress(FileNotFoundError):  # another process deletes
                        found[path.relative_to(folder).as_posix()] = path.stat().st_size
            return found

    def read(self, name: str) -> bytes:
        """The whole file."""
        with self._told():
            return (self._folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """By rename."""
        with self._told(), self._new_file(name) as file:
            file.write(data)

    def create(self, name: str, data: bytes) -> bool:
        """By a hard link, which never replaces; where links are unsupported, checks first."""
        with self._told():
            new = self._new_file(name, replace=False)
            try:
                with new as file:
                    file.write(data)
            except FileExistsError:
                return False
            return True

    def upload(self, name: str, path: Path) -> None:
        """Copies, and then renames."""
        with self._told(), path.open("rb") as source, self._new_file(name) as file:
            while piece := source.read(_PIECE_BYTES):
                self._require_running()
                file.write(piece)

    def pieces(self, name: str, *, start: int, stop: int) -> Iterator[bytes]:
        """Reads in order."""
        with self._told(), (self._folder / name).open("rb") as source:
            source.seek(start)
            while start < stop and (piece := source.read(min(_PIECE_BYTES, stop - start))):
                self._require_running()
                start += len(piece)
                yield piece

    def delete(self, name: str) -> None:
        """Deletes the file, and its folder if that is empty then."""
        with self._told():
            path = self._folder / name
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or another thread was first
                path.parent.rmdir()

    def forget_uploads(self, below: str) -> None:
        """Deletes leftovers of killed writers."""
        with self._told():
            for path in (self._folder / below).glob(".*.new"):
                self.delete(f"{below}/{path.name}")

    def stop(self) -> None:
        """Takes effect with the next piece."""
        self._stopped.set()

    def _require_running(self) -> None:
        if self._stopped.is_set():
            raise CheckpointError(f"{self.location}: given up, since the run ends")

    def _new_file(self, name: str, *, replace: bool = True) -> AbstractContextManager[BinaryIO]:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return new_file(path, replace=replace)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns disk errors into errors for users; FileNotFoundError passes through."""
        self._require_running()
        if not self._root.is_dir():
            raise RemoteUnavailableError(
                f"file://{self._root} is no folder on this machine; mount or make it, or correct "
                f"{SETTING}"
            )
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RemoteUnavailableError(
                f"{self.location} can't be used: {error}; see to the disk, or change {SETTING}"
            ) from error


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
