"""Writing and reading a run's checkpoints from all ranks at once.

torch's distributed checkpoint writes and reshards the tensors; what counts as a checkpoint is
decided by `manifest.py`. The folder must be one that all ranks see.
"""

import errno
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moetrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    TensorEntry,
    candidates,
    commit,
    delete_old,
    describe_files,
    read_manifest,
    verify_files,
)
from moetrain.checkpoint.settings import CheckpointSettings

log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run, as seen by one rank of one attempt.

    Every method is collective: all ranks call it alike. `event` is told of saves and of
    checkpoints that had to be passed over.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointSettings,
        *,
        attempt: int,
        config: Mapping[str, Any],
        timeout: Any,
        event: Callable[..., None],
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._attempt = attempt
        self._config = dict(config)
        self._event = event
        # Collectives of a save in the background must not mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._leads = dist.get_rank() == 0
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._demand_shared()

    def save(self, tensors: dict[str, Tensor], *, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint; returns when it is complete, or at once with `async_save`.

        Raises CheckpointError, on all ranks alike, if this save or the one before it failed.
        """
        self.wait()
        staged = self._directory / f"staged_{step:08d}_attempt_{self._attempt}"
        failure: BaseException | None = None
        if self._leads:
            try:
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir(parents=True)
                _demand_space(staged, tensors)
            except OSError as error:
                failure = error
        self._agree(failure, f"checkpoint of step {step} can't be written to {staged}")
        manifest = Manifest(
            step=step,
            attempt=self._attempt,
            state=state,
            config=self._config,
            tensors=_describe(tensors),
            files={},
        )
        writer = dcp.FileSystemWriter(staged, sync_files=True, overwrite=False)
        if self._settings.async_save:
            # Returns once the tensors are copied; the rest happens behind the training steps.
            writing = dcp.async_save(tensors, storage_writer=writer, process_group=self._group)
            self._running = self._background.submit(self._finish, writing, staged, manifest)
            return
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            self._commit(staged, manifest)
        except (Exception, dcp.api.CheckpointException) as error:
            failure = error
        self._agree(failure, f"checkpoint of step {step} can't be written to {staged}")

    def wait(self) -> None:
        """Waits for a save in the background; raises CheckpointError if it failed."""
        running, self._running = self._running, None
        failure = None
        if running is None:
            return
        try:
            running.result()
        except (Exception, dcp.api.CheckpointException) as error:
            failure = error
        self._agree(failure, "the checkpoint that was written in the background failed")

    def load_newest(
        self,
        tensors: Callable[[Manifest], dict[str, Tensor]],
        *,
        same_model: Callable[[Manifest], None],
    ) -> dict[str, Any] | None:
        """Loads the newest good checkpoint into the tensors, in place; returns its state.

        None where the run has none. A checkpoint that doesn't verify is passed over with an
        event that says why. Raises CheckpointError where one verifies but belongs to another
        model (`same_model` raises, or names, shapes or dtypes differ), or where none is left.
        """
        rejected = []
        names = [folder.name for folder in candidates(self._directory)]
        for name in self._gather_objects(names)[0]:  # the first rank's view decides for all
            folder = self._directory / name
            failure: BaseException | None = None
            try:
                manifest = read_manifest(folder)
                verify_files(folder, manifest, part=dist.get_rank(), parts=dist.get_world_size())
            except CheckpointError as error:
                failure = error
            reasons = [r for r in self._gather(failure) if r]
            if reasons:
                rejected.append(reasons[0])
                log.warning("passing over %s: %s", folder, reasons[0])
                if self._leads:
                    self._event("checkpoint_rejected", reason=reasons[0], checkpoint=folder.name)
                continue
            same_model(manifest)
            wanted = tensors(manifest)
            _demand_equal(_describe(wanted), manifest.tensors, folder)
            try:
                reader = dcp.FileSystemReader(folder)
                dcp.load(wanted, storage_reader=reader, process_group=self._group)
            except dcp.api.CheckpointException as error:  # no Exception, and nobody expects that
                raise CheckpointError(f"{folder} can't be read: {_root_cause(error)}") from error
            return manifest.state
        if rejected:
            raise CheckpointError(
                f"no checkpoint in {self._directory} is good: {'; '.join(rejected)}. Start anew "
                "with another run.name, or delete the folder to train from the first step"
            )
        return None

    def _finish(self, writing: Any, staged: Path, manifest: Manifest) -> None:
        writing.result()
        self._commit(staged, manifest)

    def _commit(self, staged: Path, manifest: Manifest) -> None:
        """Gathers what every rank wrote, each having hashed its own; the first rank commits."""
        try:
            own: Any = describe_files(staged, f"__{dist.get_rank()}_*")
        except OSError as error:
            own = error
        parts = self._gather_objects(own)
        if failed := [part for part in parts if isinstance(part, OSError)]:
            raise failed[0]
        if not self._leads:
            return
        files = describe_files(staged, ".metadata") | {n: d for p in parts for n, d in p.items()}
        complete = Manifest(**{**vars(manifest), "files": files})
        target = commit(self._directory, staged, complete)
        delete_old(self._directory, keep_last=self._settings.keep_last, attempt=self._attempt)
        size = sum(entry["size"] for entry in files.values())
        self._event("save", step=manifest.step, checkpoint=target.name, bytes=size)

    def _agree(self, failure: BaseException | None, what: str) -> None:
        """Raises CheckpointError on every rank if any of them failed."""
        reasons = [r for r in self._gather(failure) if r]
        if reasons:
            if self._leads:
                for leftover in self._directory.glob(f"staged_*_attempt_{self._attempt}"):
                    shutil.rmtree(leftover, ignore_errors=True)
            raise CheckpointError(f"{what}: {reasons[0]}") from failure

    def _gather(self, failure: BaseException | None) -> list[str | None]:
        return self._gather_objects(None if failure is None else _root_cause(failure))

    def _gather_objects(self, own: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own, group=self._group)
        return gathered

    def _demand_shared(self) -> None:
        """Raises CheckpointError where the ranks don't all see one folder."""
        marker = self._directory / f".shared_{self._attempt}"
        failure: Exception | None = None
        if self._leads:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                marker.touch()
            except OSError as error:
                failure = error
        self._agree(failure, f"{self._directory} can't be written to")
        if not marker.exists():
            failure = FileNotFoundError(
                f"rank {dist.get_rank()} does not see what rank 0 wrote there: run.dir must be a "
                "folder that all machines share"
            )
        try:
            self._agree(failure, f"{self._directory} is not one folder for all ranks")
        finally:
            if self._leads:
                marker.unlink(missing_ok=True)


def _demand_space(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises OSError before anything is written where the disk can't hold the tensors."""
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No space left: {needed / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB are free",
        )


def _describe(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    return {
        name: TensorEntry(shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
        for name, t in tensors.items()
    }


def _demand_equal(
    ours: Mapping[str, TensorEntry], theirs: Mapping[str, TensorEntry], folder: Path
) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{folder} is of another model: tensor {name} is {theirs.get(name) or 'absent'} "
                f"there and {ours.get(name) or 'absent'} here. Use the configuration that it was "
                "trained with, or another run.name"
            )


def _root_cause(error: BaseException) -> str:
    """Returns the message at the root of torch's nested report of failures on ranks."""
    failures = getattr(error, "failures", None)
    if failures:
        inner = next(iter(failures.values()))
        error = inner[0] if isinstance(inner, tuple) else inner
    return f"{type(error).__name__}: {error}"
