"""Checkpoints on a remote folder: which are there, who may add one, and in what order.

    checkpoints/attempts/00000003                 attempt 3 has taken the run over
    checkpoints/step_00000100_attempt_3/…         files as they were saved, manifest.json last
    checkpoints/latest                            names the newest, after all else

Owns names, order and the fence. A folder without manifest.json is no checkpoint, and nothing is
written into one that has it. The newest is the one of the newest attempt, and among those of
the newest step: whoever goes on from a checkpoint has a higher attempt than whoever saved it.
`latest` is for people and other tools; what is read follows from the listing alone, so that a
worker that was cut off can't win by writing it late.

Leaves transfers to `object_folder` and `disk_folder`, reading back to `download`, and the time
of an upload to `uploader`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetrain.checkpoint.folders import LATEST
from moetrain.checkpoint.manifest import MANIFEST, CheckpointError, folder_name
from moetrain.checkpoint.remote.disk_folder import DiskFolder
from moetrain.checkpoint.remote.folder import (
    Patience,
    RemoteFolder,
    RemoteUnavailableError,
    check_url,
    in_parallel,
)
from moetrain.checkpoint.remote.object_folder import ObjectFolder

ATTEMPTS = "attempts"

_PATIENCE = Patience()
_FOLDER = re.compile(r"step_(\d{8,15})_attempt_(\d{1,15})")
_ATTEMPT = re.compile(r"\d{8,15}")
# No `/`, and no dot in front: such a name stays in its folder and is no hidden file.
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")


class SupersededError(CheckpointError):
    """A newer attempt has taken the run over; this one may write no more."""


@dataclass(frozen=True, order=True)
class RemoteCheckpoint:
    """One checkpoint on the remote folder; the greatest is the newest."""

    attempt: int
    """The attempt that saved it."""
    step: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{folder_name(self.step)}_attempt_{self.attempt}"


def parse_name(name: str) -> RemoteCheckpoint | None:
    """The checkpoint that a folder is named after; None for any other name."""
    found = _FOLDER.fullmatch(name)
    if found is None:
        return None
    checkpoint = RemoteCheckpoint(step=int(found[1]), attempt=int(found[2]))
    return checkpoint if checkpoint.name == name else None


def demand_file_names(names: Mapping[str, object], *, source: str) -> None:
    """Raises CheckpointError for names that could leave a folder, or hide in it."""
    for name in names:
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise CheckpointError(
                f"{source} lists {name[:200]!r}, which can't be a file of its own"
            )


def open_remote(upload_to: str, *, run: str, patience: Patience = _PATIENCE) -> "RemoteCheckpoints":
    """The checkpoints of a run below an address; asks no server yet.

    Raises ConfigError where the address can't be, or the packages for it are missing.
    """
    check_url(upload_to)
    protocol, _, path = upload_to.rstrip("/").partition("://")
    below = f"{run}/checkpoints"
    if protocol == "file":
        return RemoteCheckpoints(DiskFolder(Path(path or "/"), below))
    return RemoteCheckpoints(ObjectFolder(protocol, f"{path}/{below}", patience=patience))


class RemoteCheckpoints:
    """A run's checkpoints on a remote folder.

    Methods raise CheckpointError; its subclass RemoteUnavailableError where the server is to
    blame, and SupersededError where a newer attempt owns the run.
    """

    def __init__(self, files: RemoteFolder) -> None:
        self._files = files

    @property
    def location(self) -> str:
        """The folder's address."""
        return self._files.location

    @property
    def files(self) -> RemoteFolder:
        """The folder's files."""
        return self._files

    def take_attempt(self, local_attempt: int) -> int:
        """Takes the run over: returns a number above all before, here and there.

        Two that start at once get two numbers, where the store knows exclusive creation.
        """
        number = local_attempt
        while True:
            number = max(number, self.newest_attempt()) + 1
            taken = self._files.create(f"{ATTEMPTS}/{number:08d}", f"{number}\n".encode())
            if taken and self.newest_attempt() <= number:
                return number

    def newest_attempt(self) -> int:
        """The number of the attempt that owns the run, 0 where there was none."""
        found = self._files.sizes(ATTEMPTS)
        return max((int(name) for name in found if _ATTEMPT.fullmatch(name)), default=0)

    def list_folders(self) -> dict[RemoteCheckpoint, dict[str, int]]:
        """Sizes of the files of each folder, complete or not."""
        folders: dict[RemoteCheckpoint, dict[str, int]] = {}
        for path, size in self._files.sizes().items():
            folder, _, name = path.partition("/")
            if (checkpoint := parse_name(folder)) and name:
                folders.setdefault(checkpoint, {})[name] = size
        return folders

    def list_complete(self) -> list[RemoteCheckpoint]:
        """All checkpoints, the newest first."""
        folders = self.list_folders()
        return sorted((c for c, files in folders.items() if MANIFEST in files), reverse=True)

    def upload(
        self, folder: Path, *, step: int, attempt: int, files: Mapping[str, int], owner: int
    ) -> int:
        """Uploads a complete local checkpoint and lets `latest` name the newest; returns bytes.

        `files` are the sizes that its manifest lists, `attempt` the one that saved it, `owner`
        the one that uploads. Killed at any moment, it leaves a checkpoint or none. One that is
        there already is left as it is.
        """
        saved = RemoteCheckpoint(step=step, attempt=attempt)
        demand_file_names(files, source=f"{folder / MANIFEST}")
        self._demand_ownership(saved, owner)
        try:
            manifest = (folder / MANIFEST).read_bytes()
            for name, size in files.items():
                if (found := (folder / name).stat().st_size) != size:
                    raise CheckpointError(
                        f"{folder / name} has {found} bytes, its manifest says {size}; it is not "
                        "uploaded"
                    )
            uploaded = 0
            if MANIFEST not in self._files.sizes(saved.name):
                in_parallel(lambda n: self._files.upload(f"{saved.name}/{n}", folder / n), files)
                uploaded = sum(files.values()) + len(manifest)
        except OSError as error:
            raise CheckpointError(f"{folder} can't be uploaded: {error}") from error
        self._demand_sizes(saved, files)
        self._demand_ownership(saved, owner)
        if not self._files.create(f"{saved.name}/{MANIFEST}", manifest):
            self._demand_same_manifest(saved, manifest)
        self._name_latest(saved, owner)
        return uploaded

    def delete_old(
        self, keep: Callable[[list[tuple[int, int]]], set[tuple[int, int]]], *, owner: int
    ) -> list[str]:
        """Deletes the checkpoints that `keep` leaves out, and what killed uploads left behind.

        `keep` is given (step, attempt) of all, the newest first, and returns those that stay;
        the newest always does. Returns the names of the deleted.
        """
        folders = self.list_folders()
        complete = sorted((c for c, files in folders.items() if MANIFEST in files), reverse=True)
        kept = keep([(c.step, c.attempt) for c in complete])
        old = [c for c in complete[1:] if (c.step, c.attempt) not in kept]
        # Of a newer attempt they may be under way.
        partial = [c for c, files in folders.items() if MANIFEST not in files]
        old += [c for c in partial if c.attempt <= owner]
        for checkpoint in old:
            self._demand_ownership(checkpoint, owner)
            self._delete(checkpoint, set(folders[checkpoint]))
        return [checkpoint.name for checkpoint in old if checkpoint in complete]

    def stop(self) -> None:
        """Makes a transfer that is under way, and every later call, end soon with an error."""
        self._files.stop()

    def _delete(self, checkpoint: RemoteCheckpoint, names: set[str]) -> None:
        """The manifest first: what a killed deletion leaves is no checkpoint."""
        if MANIFEST in names:
            self._files.delete(f"{checkpoint.name}/{MANIFEST}")
        self._files.forget_uploads(checkpoint.name)
        # Names that could never be a checkpoint's are not touched; nobody here put them there.
        own = sorted(n for n in names - {MANIFEST} if _FILE.fullmatch(n))
        in_parallel(lambda name: self._files.delete(f"{checkpoint.name}/{name}"), own)

    def _demand_ownership(self, saved: RemoteCheckpoint, owner: int) -> None:
        if (newest := self.newest_attempt()) > owner:
            raise SupersededError(
                f"attempt {owner} may not change {saved.name} in {self.location}: attempt "
                f"{newest} has taken the run over"
            )

    def _demand_sizes(self, saved: RemoteCheckpoint, files: Mapping[str, int]) -> None:
        found = self._files.sizes(saved.name)
        for name, size in files.items():
            if found.get(name) != size:
                there = "is missing" if name not in found else f"has {found[name]} bytes"
                raise RemoteUnavailableError(
                    f"{self.location}/{saved.name}/{name} {there} after its upload, and should "
                    f"have {size} bytes; see to the server, which said that it has them all"
                )

    def _demand_same_manifest(self, saved: RemoteCheckpoint, manifest: bytes) -> None:
        try:
            there = self._files.read(f"{saved.name}/{MANIFEST}")
        except FileNotFoundError:
            there = b""  # deleted by another attempt since
        if there != manifest:
            raise CheckpointError(
                f"{self.location}/{saved.name} holds another checkpoint, and nothing is written "
                "into one; upload this run elsewhere, under another run.name"
            )

    def _name_latest(self, saved: RemoteCheckpoint, owner: int) -> None:
        self._demand_ownership(saved, owner)
        self._files.write(LATEST, self._newest(saved).name.encode())
        if self.newest_attempt() > owner:  # taken over in between: it may have flipped before us
            self._files.write(LATEST, self._newest(saved).name.encode())
            self._demand_ownership(saved, owner)

    def _newest(self, saved: RemoteCheckpoint) -> RemoteCheckpoint:
        return max([saved, *self.list_complete()])
