"""Checkpoints on a remote folder: which are there, who may add one, and in what order.

    checkpoints/attempts/00000003                 attempt 3 has taken the run over
    checkpoints/step_00000100_attempt_3/…         files as they were saved, manifest.json last
    checkpoints/latest                            names the newest, after all else

Owns names, order and the fence. A folder without manifest.json is no checkpoint, and nothing is
written into one that has it. Which is the newest follows from the listing, by the order that
`folders` has for those of this machine. `latest` is for people and other programs; what is read
doesn't depend on it, so that a worker that was cut off can't win by writing it late.

Leaves transfers to `object_folder` and `disk_folder`, reading back to `download`, and the time
of an upload to `uploader`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from moetrain.checkpoint.folders import LATEST, Save, in_order
from moetrain.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    folder_name,
    verify_all,
)
from moetrain.checkpoint.remote.disk_folder import DiskFolder
from moetrain.checkpoint.remote.folder import (
    RemoteFolder,
    RemoteUnavailableError,
    Retries,
    check_url,
    in_parallel,
)
from moetrain.checkpoint.remote.object_folder import ObjectFolder

ATTEMPTS = "attempts"

_RETRIES = Retries()
_FOLDER = re.compile(r"step_(\d{8,15})_attempt_(\d{1,15})")
_ATTEMPT = re.compile(r"\d{8,15}")
# No `/`, and no dot in front: such a name stays in its folder and is no hidden file.
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")


class SupersededError(CheckpointError):
    """A newer attempt has taken the run over; this one may write no more."""


def remote_name(save: Save) -> str:
    """Returns the name of a checkpoint's folder."""
    return f"{folder_name(save.step)}_attempt_{save.attempt}"


def parse_name(name: str) -> Save | None:
    """Returns the checkpoint that a folder is named after; None for any other name."""
    found = _FOLDER.fullmatch(name)
    if found is None:
        return None
    save = Save(step=int(found[1]), attempt=int(found[2]))
    return save if remote_name(save) == name else None


def require_file_names(names: Iterable[str]) -> None:
    """Raises CheckpointError for names that could leave a folder, or hide in it."""
    for name in names:
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise CheckpointError(
                f"its {MANIFEST} lists {name[:200]!r}, which can't be a file of the folder"
            )


def open_remote(upload_to: str, *, run: str, retries: Retries = _RETRIES) -> "RemoteCheckpoints":
    """The checkpoints of a run below an address; asks no server yet.

    Raises ConfigError where the address can't be, or the packages for it are missing.
    """
    check_url(upload_to)
    protocol, _, path = upload_to.rstrip("/").partition("://")
    below = f"{run}/checkpoints"
    if protocol == "file":
        return RemoteCheckpoints(DiskFolder(Path(path or "/"), below))
    return RemoteCheckpoints(ObjectFolder(protocol, f"{path}/{below}", retries=retries))


def complete_of(folders: Mapping[Save, Mapping[str, int]]) -> list[Save]:
    """Returns which of them are checkpoints, in the order in which they are to be tried."""
    line, beside = in_order(save for save, sizes in folders.items() if MANIFEST in sizes)
    return line + beside


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

    def list_folders(self) -> dict[Save, dict[str, int]]:
        """Sizes of the files of each folder, complete or not."""
        folders: dict[Save, dict[str, int]] = {}
        for path, size in self._files.sizes().items():
            folder, _, name = path.partition("/")
            if (save := parse_name(folder)) and name:
                folders.setdefault(save, {})[name] = size
        return folders

    def list_complete(self) -> list[Save]:
        """All checkpoints in the order in which they are to be tried."""
        return complete_of(self.list_folders())

    def upload(self, folder: Path, manifest: Manifest, *, owner: int) -> int:
        """Uploads a complete local checkpoint and lets `latest` name the newest; returns bytes.

        `owner` is the attempt that uploads; another may have saved it. Killed at any moment, it
        leaves a checkpoint or none. One that is there already is left as it is.
        """
        save = Save(manifest.step, manifest.attempt)
        name, sizes = remote_name(save), {n: entry.size for n, entry in manifest.files.items()}
        require_file_names(sizes)
        self._require_ownership(save, owner)
        try:
            text = (folder / MANIFEST).read_bytes()
            uploaded = 0
            if MANIFEST not in self._files.sizes(name):
                verify_all(folder, manifest)  # older ones may be deleted for this
                in_parallel(lambda n: self._files.upload(f"{name}/{n}", folder / n), sizes)
                uploaded = sum(sizes.values()) + len(text)
        except OSError as error:
            raise CheckpointError(f"{folder} can't be uploaded: {error}") from error
        self._require_sizes(name, sizes)
        self._require_ownership(save, owner)
        if not self._files.create(f"{name}/{MANIFEST}", text):
            self._require_same_manifest(name, text)
        self._name_latest(save, owner)
        return uploaded

    def delete_old(
        self, old: Callable[[Collection[Save]], Collection[Save]], *, owner: int
    ) -> list[str]:
        """Deletes the checkpoints that `old` picks, and what killed uploads left behind.

        `old` is given all checkpoints; the newest stays whatever it says. Returns the names of
        the deleted.
        """
        folders = self.list_folders()
        complete = complete_of(folders)
        picked = set(old(complete)) & set(complete[1:])
        # Of a newer attempt they may be under way.
        partial = [s for s in folders if s.attempt <= owner and MANIFEST not in folders[s]]
        for save in sorted(picked) + partial:
            self._require_ownership(save, owner)
            self._delete(remote_name(save), set(folders[save]))
        return [remote_name(save) for save in sorted(picked)]

    def stop(self) -> None:
        """Makes a transfer that is under way, and every later call, end soon with an error."""
        self._files.stop()

    def _delete(self, folder: str, names: set[str]) -> None:
        """The manifest first: what a killed deletion leaves is no checkpoint."""
        if MANIFEST in names:
            self._files.delete(f"{folder}/{MANIFEST}")
        self._files.forget_uploads(folder)
        # Names that could never be a checkpoint's are not touched; nobody here put them there.
        own = sorted(n for n in names - {MANIFEST} if _FILE.fullmatch(n))
        in_parallel(lambda name: self._files.delete(f"{folder}/{name}"), own)

    def _require_ownership(self, save: Save, owner: int) -> None:
        if (newest := self.newest_attempt()) > owner:
            raise SupersededError(
                f"attempt {owner} may not change {remote_name(save)} in {self.location}: attempt "
                f"{newest} has taken the run over"
            )

    def _require_sizes(self, folder: str, sizes: Mapping[str, int]) -> None:
        found = self._files.sizes(folder)
        for name, size in sizes.items():
            if found.get(name) != size:
                there = "is missing" if name not in found else f"has {found[name]} bytes"
                raise RemoteUnavailableError(
                    f"{self.location}/{folder}/{name} {there} after its upload, and should have "
                    f"{size} bytes; see to the server, which said that it has them all"
                )

    def _require_same_manifest(self, folder: str, text: bytes) -> None:
        try:
            there = self._files.read(f"{folder}/{MANIFEST}")
        except FileNotFoundError:
            there = b""  # deleted by another attempt since
        if there != text:
            raise CheckpointError(
                f"{self.location}/{folder} holds another checkpoint, and nothing is written into "
                "one; upload this run elsewhere, under another run.name"
            )

    def _name_latest(self, save: Save, owner: int) -> None:
        self._require_ownership(save, owner)
        self._write_latest(save)
        if self.newest_attempt() > owner:  # taken over in between: it may have flipped before us
            self._write_latest(save)
            self._require_ownership(save, owner)

    def _write_latest(self, save: Save) -> None:
        line, _ = in_order({save, *self.list_complete()})
        self._files.write(LATEST, remote_name(line[0]).encode())
