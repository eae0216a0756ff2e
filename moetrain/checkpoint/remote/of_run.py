"""A run's remote folder, if any: what the start, the ranks and the end of a run do with it.

Leaves transfers to others. Everything here does next to nothing where `upload_to` isn't set.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

from data_pipeline.atomic_files import write_file
from data_pipeline.quantities import decimal_size
from moetrain.checkpoint.folders import (
    ATTEMPT,
    LATEST,
    Save,
    newest_good,
    next_attempt,
    to_delete,
)
from moetrain.checkpoint.manifest import Manifest, folder_name, read_manifest, read_summary
from moetrain.checkpoint.remote.checkpoints import open_remote
from moetrain.checkpoint.remote.download import fetch_newest, newer_saves
from moetrain.checkpoint.remote.folder import RemoteUnavailableError
from moetrain.checkpoint.remote.uploader import Uploader
from moetrain.checks import ConfigError
from moetrain.kinds import EventKind
from moetrain.settings import CheckpointSettings

log = logging.getLogger(__name__)

_SAY_SECONDS = 5.0


def good_save(directory: Path) -> Save | None:
    """Returns the newest checkpoint of a directory that verifies."""
    folder = newest_good(directory, rejected=lambda name, reason: None)
    if folder is None:
        return None
    manifest = read_summary(folder)
    return Save(manifest.step, manifest.attempt)


def is_newer_there(settings: CheckpointSettings, *, run: str, good: Save | None) -> bool:
    """Returns whether the remote folder, if there is one, has a newer checkpoint than the good one.

    Writes nothing. Raises ConfigError for a new run where the remote folder holds another one, and
    CheckpointError where the folder can't be read.
    """
    if settings.upload_to is None:
        return False
    there = open_remote(settings.upload_to, run=run).list_complete()
    newer = bool(newer_saves(there, good))
    if newer and good is not None and good.step == 0:
        raise ConfigError(
            "checkpoint.upload_to",
            settings.upload_to,
            f"has a checkpoint of step {there[0].step} of a run {run}, and the one here stands at "
            "its beginning: it is another run; use another run.name, or another address",
        )
    return newer


class _FoundError(Exception):
    """Ends a download once its manifest, which is all that is needed, was read."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.manifest = manifest


def newest_manifest_there(settings: CheckpointSettings, *, run: str) -> Manifest | None:
    """Returns the manifest of a run's newest remote checkpoint; None where there is none.

    Raises CheckpointError where the remote folder can't be read.
    """
    if settings.upload_to is None:
        return None

    def take(manifest: Manifest) -> NoReturn:
        raise _FoundError(manifest)

    remote = open_remote(settings.upload_to, run=run)
    with tempfile.TemporaryDirectory(prefix="moetrain-") as folder:
        try:
            fetch_newest(
                remote, Path(folder), newer_than=None, demand=take, rejected=lambda *_: None
            )
        except _FoundError as found:
            return found.manifest
    return None


def fetch_newer(
    settings: CheckpointSettings,
    *,
    run: str,
    directory: Path,
    good: Save | None,
    demand: Callable[[Manifest], None],
    event: Callable[..., None],
    say: Callable[[str], None],
) -> None:
    """Downloads the newest good remote checkpoint, if it is newer than the directory's good one.

    `demand` raises for a manifest that the run can't resume from, before more is downloaded. Raises
    CheckpointError where the remote folder can't be read, or the local disk is full.
    """
    assert settings.upload_to is not None
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if done == total or time.monotonic() > said + _SAY_SECONDS:
            said = time.monotonic()
            say(f"downloading a checkpoint: {decimal_size(done)} of {decimal_size(total)}")

    fetched = fetch_newest(
        open_remote(settings.upload_to, run=run),
        directory,
        newer_than=good,
        demand=demand,
        rejected=lambda name, reason: event(
            EventKind.checkpoint_rejected, checkpoint=name, reason=reason
        ),
        progress=progress,
    )
    if fetched is not None:
        write_file(directory / LATEST, fetched.name)
        event(EventKind.download, checkpoint=fetched.name, reason=f"newest in {settings.upload_to}")


def upload_missing(settings: CheckpointSettings, *, run: str, directory: Path, good: Save) -> bool:
    """Uploads a finished run's good checkpoint if it is missing; returns whether it was.

    Raises CheckpointError where the upload fails.
    """
    if settings.upload_to is None:
        return False
    remote = open_remote(settings.upload_to, run=run)
    if good in remote.list_complete():
        return False
    folder = directory / folder_name(good.step)
    attempt = take_over(settings, run=run, directory=directory)
    remote.upload(folder, read_manifest(folder), owner=attempt)
    return True


def take_over(
    settings: CheckpointSettings, *, run: str, directory: Path, may_be_alone: bool = False
) -> int:
    """Returns the number of a new attempt, above all earlier ones, local and remote.

    Raises RemoteUnavailableError where the remote folder can't be reached, unless the attempt
    before was this process's own (`may_be_alone`): then the local number suffices.
    """
    attempt = next_attempt(directory)
    if settings.upload_to is None:
        return attempt
    try:
        taken = open_remote(settings.upload_to, run=run).take_attempt(attempt - 1)
    except RemoteUnavailableError as error:
        if not may_be_alone:
            raise
        log.warning("attempt %d is not known in %s: %s", attempt, settings.upload_to, error)
        return attempt
    if taken > attempt:
        write_file(directory / ATTEMPT, str(taken))
    return taken


def start_uploads(
    settings: CheckpointSettings, *, run: str, attempt: int, event: Callable[..., None]
) -> Uploader | None:
    """Returns the uploader of an attempt's checkpoints; None where they stay local."""
    if settings.upload_to is None:
        return None

    def old(saves: Collection[Save]) -> list[Save]:
        return to_delete(saves, keep_last=settings.keep_last, keep_every=settings.keep_every)

    remote = open_remote(settings.upload_to, run=run)
    return Uploader(remote, owner=attempt, old=old, event=event)
