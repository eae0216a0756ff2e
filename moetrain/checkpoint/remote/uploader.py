"""Uploads checkpoints asynchronously.

Owns when an upload happens, and failures: training never stops because of one. Leaves what is
written, and in which order, to `checkpoints`.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from moetrain.checkpoint.folders import Save
from moetrain.checkpoint.manifest import CheckpointError, Manifest
from moetrain.checkpoint.remote.checkpoints import RemoteCheckpoints
from moetrain.checkpoint.remote.folder import RemoteUnavailableError
from moetrain.kinds import EventKind

log = logging.getLogger(__name__)

# A transfer reacts to `stop` within a fifth of a second.
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class _Task:
    folder: Path
    manifest: Manifest


class Uploader:
    """A thread that uploads the newest submitted checkpoint, one at a time.

    An upload that hasn't begun when a newer checkpoint is submitted is dropped. One that failed
    because the server couldn't be reached is retried after `retry_seconds`, unless a newer
    checkpoint was submitted.

    `event` is called, from the thread, for `upload` (step, checkpoint, bytes, seconds),
    `upload_failed` (step, reason), `upload_skipped` (step, reason), `remote_deleted` (checkpoints)
    and `remote_delete_failed` (reason). `old` is that of `RemoteCheckpoints.delete_old`.
    """

    def __init__(
        self,
        remote: RemoteCheckpoints,
        *,
        owner: int,
        old: Callable[[Collection[Save]], Collection[Save]],
        event: Callable[..., None],
        retry_seconds: float = 300.0,
    ) -> None:
        self._remote, self._owner, self._old, self._event = remote, owner, old, event
        self._retry_seconds = retry_seconds
        self._changed = threading.Condition()
        self._next: _Task | None = None
        self._running: _Task | None = None
        self._not_before = 0.0
        self._closing = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint_upload", daemon=True)
        self._thread.start()

    def submit(self, folder: Path, manifest: Manifest) -> None:
        """Submits a complete local checkpoint; it replaces one that still waits."""
        with self._changed:
            if self._closing:
                raise RuntimeError(f"{folder} came after the uploader was closed")
            skipped = self._next
            self._next, self._not_before = _Task(folder, manifest), 0.0
            self._changed.notify_all()
        if skipped is not None and skipped.folder != folder:
            self._tell(
                EventKind.upload_skipped,
                step=skipped.manifest.step,
                reason=f"step {manifest.step} is newer",
            )

    def busy(self) -> set[str]:
        """Names of the local folders that must not be deleted now."""
        with self._changed:
            return {task.folder.name for task in (self._next, self._running) if task is not None}

    def close(self, timeout: float | None = None) -> str | None:
        """Waits for submitted uploads; returns why the last one failed, if it did.

        Gives up after `timeout` seconds. A later call returns the same.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._remote.stop()
            self._thread.join(_STOP_SECONDS)
            return (
                f"{self._remote.location}: the newest checkpoint was still being uploaded after "
                f"{timeout:g} s; it stays on this machine"
            )
        return self._failure

    def _run(self) -> None:
        while (task := self._take()) is not None:
            failure = self._upload(task)
            with self._changed:
                self._running, self._failure = None, None if failure is None else str(failure)
                again = isinstance(failure, RemoteUnavailableError) and not self._closing
                if again and self._next is None:
                    self._next = task
                    self._not_before = time.monotonic() + self._retry_seconds

    def _take(self) -> _Task | None:
        """Waits until the next task is due and returns it; None when there will be none."""
        with self._changed:
            while True:
                pause = self._not_before - time.monotonic()
                if self._next is not None and (pause <= 0 or self._closing):
                    self._running, self._next = self._next, None
                    return self._running
                if self._closing:
                    return None
                self._changed.wait(pause if self._next is not None else None)

    def _upload(self, task: _Task) -> Exception | None:
        began = time.monotonic()
        try:
            num_bytes = self._remote.upload(task.folder, task.manifest, owner=self._owner)
        except Exception as error:
            what = str(error) if isinstance(error, CheckpointError) else repr(error)
            log.warning("the checkpoint of step %d isn't uploaded: %s", task.manifest.step, what)
            self._tell(EventKind.upload_failed, step=task.manifest.step, reason=what)
            return error
        self._tell(
            EventKind.upload,
            step=task.manifest.step,
            checkpoint=task.folder.name,
            bytes=num_bytes,
            seconds=time.monotonic() - began,
        )
        try:
            if deleted := self._remote.delete_old(self._old, owner=self._owner):
                self._tell(EventKind.remote_deleted, checkpoints=deleted)
        except Exception as error:  # the next upload retries
            log.warning("old checkpoints in %s stay: %s", self._remote.location, error)
            self._tell(EventKind.remote_delete_failed, reason=str(error))
        return None

    def _tell(self, kind: EventKind, **fields: object) -> None:
        try:
            self._event(kind, **fields)
        except Exception:  # a full disk under events.jsonl must not end the uploads
            log.exception("an event of kind %s is lost", kind)
