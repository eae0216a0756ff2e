"""A run's remote folder, where it has one: what its start, its ranks and its end do with it.

Owns nothing of transfers. Everything here does next to nothing where `upload_to` isn't set.
"""

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path

from moetrain.checkpoint.folders import (
    ATTEMPT,
    Save,
    in_order,
    next_attempt,
    replace_text,
    saves,
    to_delete,
)
from moetrain.checkpoint.remote.checkpoints import open_remote
from moetrain.checkpoint.remote.download import fetch_newest
from moetrain.checkpoint.remote.folder import RemoteUnavailableError
from moetrain.checkpoint.remote.uploader import Uploader
from moetrain.checkpoint.settings import CheckpointSettings

log = logging.getLogger(__name__)

_SAY_SECONDS = 5.0


def is_newer_there(settings: CheckpointSettings, *, run: str, directory: Path) -> bool:
    """Returns whether the remote folder, if there is one, has a checkpoint newer than all here.

    Writes nothing. Raises ConfigError or CheckpointError where it can't be asked.
    """
    if settings.upload_to is None:
        return False
    there = open_remote(settings.upload_to, run=run).list_complete()
    line, _ = in_order(saves(directory))
    return bool(there) and (not line or (there[0].attempt, there[0].step) > line[0][::-1])


def fetch_newer(
    settings: CheckpointSettings,
    *,
    run: str,
    directory: Path,
    event: Callable[..., None],
    say: Callable[[str], None],
) -> None:
    """Downloads the newest good remote checkpoint, if it is newer than what the directory has.

    Raises CheckpointError where the remote folder can't be asked, or this disk has no room.
    """
    assert settings.upload_to is not None
    line, _ = in_order(saves(directory))
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if done == total or time.monotonic() > said + _SAY_SECONDS:
            said = time.monotonic()
            say(f"downloading a checkpoint: {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB")

    fetched = fetch_newest(
        open_remote(settings.upload_to, run=run),
        directory,
        newer_than=line[0] if line else None,
        rejected=lambda name, reason: event("checkpoint_rejected", checkpoint=name, reason=reason),
        progress=progress,
    )
    if fetched is not None:
        event("download", checkpoint=fetched.name, reason=f"newest in {settings.upload_to}")


def take_over(
    settings: CheckpointSettings, *, run: str, directory: Path, may_be_alone: bool = False
) -> int:
    """Returns the number of a new attempt, above all before it, here and on the remote folder.

    Raises RemoteUnavailableError where that can't be asked, unless the attempt before was this
    process's own (`may_be_alone`): then its number here will do.
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
        replace_text(directory / ATTEMPT, str(taken))
    return taken


def start_uploads(
    settings: CheckpointSettings, *, run: str, attempt: int, event: Callable[..., None]
) -> Uploader | None:
    """Returns what uploads an attempt's checkpoints; None where they stay here."""
    if settings.upload_to is None:
        return None

    def old(saves: Collection[Save]) -> list[Save]:
        return to_delete(saves, keep_last=settings.keep_last, keep_every=settings.keep_every)

    remote = open_remote(settings.upload_to, run=run)
    return Uploader(remote, owner=attempt, old=old, event=event)
