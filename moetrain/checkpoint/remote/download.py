"""Downloads the newest good checkpoint from a remote folder.

A download becomes a checkpoint by one rename, after all of it was verified. A remote folder isn't
trusted: no name may escape the folder, and nothing is used before its hash is checked.
"""

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from data_pipeline.atomic_files import name_folder, write_file
from moetrain.checkpoint.folders import (
    Save,
    in_order,
    remove,
    require_space,
    with_way_out,
)
from moetrain.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    folder_name,
    read_manifest,
    verify_files,
)
from moetrain.checkpoint.remote.checkpoints import (
    RemoteCheckpoints,
    complete_of,
    remote_name,
    require_file_names,
)
from moetrain.checkpoint.remote.folder import RemoteFolder, in_parallel

_STAGED = "staged_download_"
# Thousands of ranks and tensors need some tens of MiB; a larger file can't be our manifest.
_MOST_MANIFEST_BYTES = 2**30


class _DamagedError(Exception):
    """This checkpoint is corrupted; another may be good."""


def fetch_newest(
    remote: RemoteCheckpoints,
    directory: Path,
    *,
    newer_than: Save | None,
    demand: Callable[[Manifest], None] = lambda manifest: None,
    rejected: Callable[[str, str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path | None:
    """Downloads the newest remote checkpoint that verifies, as a step folder of `directory`.

    `newer_than` is the newest good one in `directory`, if there is one. `demand` may refuse a
    manifest by an error of its own, before the rest is downloaded. `rejected` is called with the
    name and the reason of each that is skipped; `progress`, from several threads, with the bytes
    done and the total. What was downloaded before a kill is reused.

    Returns None where nothing newer exists, or nothing newer is good. Raises RemoteUnavailableError
    where the server can't be reached, CheckpointError where the local disk is full or fails.
    """
    folders = remote.list_folders()
    wanted = newer_saves(complete_of(folders), newer_than)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if wanted:
            _delete_staged(directory, but=wanted[0])
        for save in wanted:
            fetch = _Fetch(remote.files, directory, save, folders[save], progress)
            try:
                return fetch.run(demand)
            except _DamagedError as error:
                shutil.rmtree(fetch.staged, ignore_errors=True)
                rejected(f"{remote.location}/{remote_name(save)}", str(error))
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint of {remote.location} can be brought to {directory}: "
            f"{with_way_out(str(error), error)}"
        ) from error
    return None


def newer_saves(complete: list[Save], than: Save | None) -> list[Save]:
    """Returns those that would be tried before a local one."""
    if than is None:
        return complete
    line, beside = in_order({than, *complete})
    order = line + beside
    return order[: order.index(than)]


class _Fetch:
    """The download of one checkpoint."""

    def __init__(
        self,
        files: RemoteFolder,
        directory: Path,
        save: Save,
        there: Mapping[str, int],
        progress: Callable[[int, int], None],
    ) -> None:
        self._files, self._there, self._progress = files, there, progress
        self._save, self._name = save, remote_name(save)
        self.staged = directory / f"{_STAGED}{save.step:08d}_attempt_{save.attempt}"
        self._target = directory / folder_name(save.step)
        self._lock, self._done = threading.Lock(), 0

    def run(self, demand: Callable[[Manifest], None]) -> Path:
        """Downloads it; raises _DamagedError."""
        text = self._read_manifest()
        resumed = self._prepare(text)
        try:
            manifest = read_manifest(self.staged)
            require_file_names(manifest.files)
        except CheckpointError as error:
            raise _DamagedError(str(error)) from error
        if (found := Save(manifest.step, manifest.attempt)) != self._save:
            raise _DamagedError(
                f"its {MANIFEST} is that of step {found.step} and attempt {found.attempt}"
            )
        try:
            demand(manifest)
        except Exception:
            shutil.rmtree(self.staged)
            raise
        sizes = {name: entry.size for name, entry in manifest.files.items()}
        self._require_sizes(sizes)
        if self._is_here(text, manifest):
            self._progress(sum(sizes.values()), sum(sizes.values()))
            shutil.rmtree(self.staged)
            return self._target
        self._download(sizes)
        try:
            verify_files(self.staged, manifest)
        except CheckpointError as error:
            if not resumed:
                raise _DamagedError(str(error)) from error
            # The leftovers of an earlier download may be corrupted, and not the remote files.
            shutil.rmtree(self.staged)
            return self.run(demand)
        self._commit()
        return self._target

    def _read_manifest(self) -> bytes:
        size = self._there[MANIFEST]
        if size > _MOST_MANIFEST_BYTES:
            raise _DamagedError(f"its {MANIFEST} has {size} bytes, which no manifest has")
        try:
            manifest = self._files.read(f"{self._name}/{MANIFEST}")
        except FileNotFoundError:
            raise _DamagedError(f"its {MANIFEST} is gone: it is being deleted") from None
        if len(manifest) != size:
            raise _DamagedError(f"{len(manifest)} bytes of its {MANIFEST} came, of {size}")
        return manifest

    def _prepare(self, manifest: bytes) -> bool:
        """Makes the staging folder; returns whether it holds part of this checkpoint already."""
        try:
            if (self.staged / MANIFEST).read_bytes() == manifest:
                return True
        except FileNotFoundError:
            pass
        shutil.rmtree(self.staged, ignore_errors=True)
        self.staged.mkdir()
        write_file(self.staged / MANIFEST, manifest)
        return False

    def _require_sizes(self, sizes: Mapping[str, int]) -> None:
        """Checks sizes against the listing, before a download."""
        for name, size in sizes.items():
            if (found := self._there.get(name)) != size:
                there = "is missing" if found is None else f"has {found} bytes"
                raise _DamagedError(f"{name} {there}, and its manifest says {size} bytes")

    def _is_here(self, text: bytes, manifest: Manifest) -> bool:
        """Whether this checkpoint is complete in `directory`, as after a kill after the rename."""
        try:
            if (self._target / MANIFEST).read_bytes() != text:
                return False
            verify_files(self._target, manifest)
        except (OSError, CheckpointError):
            return False
        return True

    def _download(self, sizes: Mapping[str, int]) -> None:
        total = sum(sizes.values())
        have = {name: self._have(name, size) for name, size in sizes.items()}
        self._done = sum(have.values())
        require_space(self.staged, total - self._done)
        self._progress(self._done, total)

        def fetch(name: str) -> None:
            with (self.staged / name).open("ab") as file:
                source = f"{self._name}/{name}"
                try:
                    for piece in self._files.pieces(source, start=have[name], stop=sizes[name]):
                        file.write(piece)
                        with self._lock:
                            self._done += len(piece)
                            self._progress(self._done, total)
                except FileNotFoundError:
                    raise _DamagedError(f"{name} is gone: it is being deleted") from None
                if (found := file.tell()) != sizes[name]:
                    raise _DamagedError(f"{found} bytes of {name} came, of {sizes[name]}")
                file.flush()
                os.fsync(file.fileno())

        in_parallel(fetch, sizes)

    def _have(self, name: str, size: int) -> int:
        """Bytes of a file that were downloaded before."""
        path = self.staged / name
        found = path.stat().st_size if path.is_file() else 0
        if found > size:
            path.unlink()
        return found if found <= size else 0

    def _commit(self) -> None:
        """Renames the checkpoint into place; moves away a corrupted or another attempt's one."""
        if os.path.lexists(self._target):
            replaced = f"replaced_{self._target.name}_attempt_{self._save.attempt}"
            remove(self._target.with_name(replaced))
            os.rename(self._target, self._target.with_name(replaced))
        name_folder(self.staged, self._target)


def _delete_staged(directory: Path, *, but: Save) -> None:
    """Deletes leftovers of downloads other than the next one."""
    kept = f"{_STAGED}{but.step:08d}_attempt_{but.attempt}"
    for folder in directory.glob(f"{_STAGED}*"):
        if folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)
