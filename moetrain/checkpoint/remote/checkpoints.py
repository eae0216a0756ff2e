"""Checkpoints in a remote folder: which exist, who may add one, and in what order.

    checkpoints/attempts/00000003                 attempt 3 has taken the run over
    checkpoints/step_00000100_attempt_3/…         files as they were saved, manifest.json last
    checkpoints/latest                            names the newest, written last

Owns names, order and the fence. A folder without manifest.json is not a checkpoint, and nothing is
written into a folder that has one. The newest follows from the listing, by the same order as
`folders` uses for local checkpoints. `latest` is for people and other programs; reading doesn't
depend on it, so that a worker that was cut off can't win by writing it late.

Leaves transfers to `object_folder` and `disk_folder`, reading back to `download`, and when to
upload to `uploader`.
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
# No `/` and no leading dot: such a name stays in its folder and isn't a hidden file.
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")


class SupersededError(CheckpointError):
    """A newer attempt has taken over the run; this one may no longer write."""


def remote_name(save: Save) -> str:
    """Returns the name of a checkpoint's folder."""
    return f"{folder_name(save.step)}_attempt_{save.attempt}"


def parse_name(name: str) -> Save | None:
    """Returns the checkpoint of a folder's name; None for any other name."""
    found = _FOLDER.fullmatch(name)
    if found is None:
        return None
    save = Save(step=int(found[1]), attempt=int(found[2]))
    return save if remote_name(save) == name else None


def require_file_names(names: Iterable[str]) -> None:
    """Raises CheckpointError for names that could escape the folder, or be hidden in it."""
    for name in names:
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise CheckpointError(
                f"its {MANIFEST} lists {name[:200]!r}, which can't be a file of the folder"
            )


def open_remote(upload_to: str, *, run: str, retries: Retries = _RETRIES) -> "RemoteCheckpoints":
    """The checkpoints of a run below an address; makes no request yet.

    Raises ConfigError where the address is invalid, or the packages for it are missing.
    """
    check_url(upload_to)
    protocol, _, path = upload_to.rstrip("/").partition("://")
    below = f"{run}/checkpoints"
    if protocol == "file":
        return RemoteCheckpoints(DiskFolder(Path(path or "/"), below))
    return RemoteCheckpoints(ObjectFolder(protocol, f"{path}/{below}", retries=retries))


def complete_of(folders: Mapping[Save, Mapping[str, int]]) -> list[Save]:
    """Returns the complete checkpoints among them, in the order in which to try them."""
    line, beside = in_order(save for save, sizes in folders.items() if MANIFEST in sizes)
    return line + beside


class RemoteCheckpoints:
    """A run's checkpoints in a remote folder.

    Methods raise CheckpointError; its subclass RemoteUnavailableError where the server fails, and
    SupersededError where a newer attempt owns the run.
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
        """Takes over the run: returns a number above all earlier ones, local and remote.

        Two attempts that start at the same time get different numbers, if the store supports
        exclusive creation.
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
        """All checkpoints, in the order in which to try them."""
        return complete_of(self.list_folders())

    def upload(self, folder: Path, manifest: Manifest, *, owner: int) -> int:
        """Uploads a complete local checkpoint and updates `latest`; returns the bytes.

        `owner` is the attempt that uploads; another may have saved the checkpoint. A kill at any
        moment leaves a complete checkpoint or none. One that exists already is left as it is.
        """
        save = Save(manifest.step, manifest.attempt)
        name, sizes = remote_name(save), {n: entry.size for n, entry in manifest.files.items()}
        require_file_names(sizes)
        self._require_ownership(save, owner)
        try:
            text = (folder / MANIFEST).read_bytes()
            uploaded = 0
            if MANIFEST not in self._files.sizes(name):
                verify_all(folder, manifest)  # older ones may be deleted because of it
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

        `old` is called with all checkpoints; the newest always stays. Returns the names of those
        that were deleted.
        """
        folders = self.list_folders()
        complete = complete_of(folders)
        picked = set(old(complete)) & set(complete[1:])
        # Those of a newer attempt may be uploads in progress.
        partial = [s for s in folders if s.attempt <= owner and MANIFEST not in folders[s]]
        for save in sorted(picked) + partial:
            self._require_ownership(save, owner)
            self._delete(remote_name(save), set(folders[save]))
        return [remote_name(save) for save in sorted(picked)]

    def stop(self) -> None:
        """Makes a transfer in progress, and every later call, end soon with an error."""
        self._files.stop()

    def _delete(self, folder: str, names: set[str]) -> None:
        """The manifest first: then a killed deletion doesn't leave a checkpoint."""
        if MANIFEST in names:
            self._files.delete(f"{folder}/{MANIFEST}")
        self._files.forget_uploads(folder)
        # Names that no checkpoint can have are left alone: this package didn't write them.
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
        # Taken over meanwhile: the new owner may have written `latest` before us, so list again.
        if self.newest_attempt() > owner:
            self._write_latest(save)
            self._require_ownership(save, owner)

    def _write_latest(self, save: Save) -> None:
        line, _ = in_order({save, *self.list_complete()})
        self._files.write(LATEST, remote_name(line[0]).encode())
