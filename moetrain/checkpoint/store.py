"""Writing and reading a run's checkpoints from all ranks.

Every rank writes a file with its part of the tensors; `manifest.py` and `folders.py` decide what
counts as a checkpoint. The folder must be shared by all ranks.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from data_pipeline.atomic_files import sync
from moetrain.checkpoint.blocks import (
    LocalBlock,
    Staging,
    Written,
    as_block,
    complete,
    describe,
    held,
    num_bytes,
    parts_at,
    places_to_write,
)
from moetrain.checkpoint.folders import (
    Save,
    broken,
    candidates,
    commit,
    delete,
    in_order,
    require_space,
    saves,
    staged_folder,
    to_delete,
)
from moetrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    folder_name,
    forget_cached,
    read_manifest,
    read_to_send,
    require_same_tensors,
    verify_files,
)
from moetrain.checkpoint.rank_failure import RankFailure, rank_failure
from moetrain.checkpoint.tensor_files import CheckpointReader, TensorFileWriter
from moetrain.kinds import EventKind
from moetrain.settings import CheckpointSettings

log = logging.getLogger(__name__)

ALIVE_SECONDS = 1.0


class CheckpointStore:
    """The checkpoints of one run, as seen by one rank of one attempt.

    Every method except `failed` is collective: all ranks call it alike. `event` is called for saves
    and for checkpoints that were skipped.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointSettings,
        *,
        attempt: int,
        config: Mapping[str, Any],
        mesh: Mapping[str, Any],
        timeout: timedelta,
        event: Callable[..., None],
        good: Callable[[Path, Manifest], None] = lambda folder, manifest: None,
        in_use: Callable[[], set[str]] = set,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """`good` is called on the first rank with each checkpoint that was saved or loaded, and
        `in_use` returns there which folders must not be deleted now. `alive` is called regularly
        while the caller waits for a save or a load that makes progress."""
        self._directory = directory
        self._settings = settings
        self._attempt = attempt
        self._config, self._mesh = dict(config), dict(mesh)
        self._event, self._good, self._in_use, self._alive = event, good, in_use, alive
        self._advanced = 0
        """How many files and tensors the background thread has processed: its progress."""
        # Collectives of an asynchronous save must not mix with those of training: after loading,
        # only the background thread uses this group.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._leads = dist.get_rank() == 0
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: list[Future[None]] = []
        self._names: set[str] = set()
        self._places: dict[str, tuple[int, ...]] = {}
        self._staging = Staging()
        self._damaged: set[Save] = set()
        """Checkpoints that did not verify when they were read back; only on the first rank."""
        self._require_shared()

    def save(self, tensors: Mapping[str, Tensor], *, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint; returns when it is complete, or immediately with `async_save`.

        Only one save is in flight: a new one waits for the one before. Raises CheckpointError, on
        all ranks alike, if this save or the one before it failed.
        """
        self.wait()
        if self._names != tensors.keys():  # an optimizer has no state before its first step
            self._names, self._places = set(tensors), places_to_write(tensors)
        parts = parts_at(tensors, self._places)
        if self._settings.async_save:
            parts = self._staging.copy(parts)
        manifest = Manifest(
            step=step,
            attempt=self._attempt,
            state=state,
            config=self._config,
            mesh=self._mesh,
            tensors=describe(tensors),
            files={},
        )
        writing = self._background.submit(self._write, parts, manifest)
        self._running = [writing, self._background.submit(self._tidy, writing)]
        if not self._settings.async_save:
            self._await(writing)

    @property
    def failed(self) -> bool:
        """Whether an asynchronous save has failed: check at every step, and then call `wait`."""
        return any(job.done() and job.exception() is not None for job in self._running)

    def wait(self) -> None:
        """Waits for an asynchronous save; raises CheckpointError if it failed."""
        running, self._running = self._running, []
        for job in running:
            self._await(job)

    def _await(self, job: Future[None]) -> None:
        seen = self._advanced
        while not wait([job], timeout=ALIVE_SECONDS).done:
            if seen != (seen := self._advanced):
                self._alive()
        job.result()

    def _advance(self) -> None:
        self._advanced += 1

    def close(self, *, timeout_seconds: float) -> None:
        """Waits for an asynchronous save to end, whether it succeeds or fails."""
        wait(self._running, timeout=timeout_seconds)
        self._background.shutdown(wait=False, cancel_futures=True)

    def load_newest(
        self,
        tensors: Callable[[Manifest], Mapping[str, Tensor]],
        *,
        same_model: Callable[[Manifest], None],
        unread: Callable[[Manifest, str], bool] = lambda manifest, name: False,
    ) -> Manifest | None:
        """Loads the newest good checkpoint into the tensors, in place; returns its manifest.

        None where the run has none. A checkpoint that doesn't verify is skipped, with an event that
        says why. Raises CheckpointError where one verifies but belongs to another model
        (`same_model` raises, or names, shapes or dtypes differ), or where none is left. `unread`
        says whether a checkpoint's tensor, by its name, isn't needed to resume.
        """
        rejected = []

        def reject(name: str, reason: str) -> None:
            rejected.append(reason)
            log.warning("passing over %s: %s", name, reason)
            if self._leads:
                self._event(EventKind.checkpoint_rejected, reason=reason, checkpoint=name)

        # The first rank decides for all, and reads for all: a manifest of many ranks is large, and
        # small as it is sent, where the blocks of tensors that are cut alike are there once.
        bad, names = self._from_first(self._to_load)
        for name, reason in bad:
            reject(name, reason)
        for name in names:
            folder = self._directory / name
            failure: CheckpointError | None = None
            problem, manifest = self._from_first(partial(_read_for_all, folder))
            if problem:
                reject(name, problem.reason)
                continue
            assert isinstance(manifest, Manifest)
            try:
                verify_files(
                    folder,
                    manifest,
                    part=dist.get_rank(),
                    parts=dist.get_world_size(),
                    advanced=self._alive,
                )
            except CheckpointError as error:
                failure = error
            if problems := self._problems(failure):
                reject(name, problems[0].reason)
                continue
            same_model(manifest)
            wanted = tensors(manifest)
            theirs = {n: e for n, e in manifest.tensors.items() if not unread(manifest, n)}
            require_same_tensors(describe(wanted), theirs, folder)
            try:
                with CheckpointReader(folder, manifest=manifest) as reader:
                    for tensor_name, tensor in wanted.items():
                        part = held(tensor)
                        reader.read_into(tensor_name, part.local, offset=part.offset)
                        self._alive()
            except CheckpointError as error:
                failure = error
            self._agree(failure, f"{folder} can't be read")
            if self._leads:
                self._good(folder, manifest)
            return manifest
        if rejected:
            raise CheckpointError(
                f"no checkpoint in {self._directory} is good: {'; '.join(rejected)}. Start anew "
                "with another run.name, or delete the folder to train from the first step"
            )
        return None

    def _to_load(self) -> tuple[list[tuple[str, str]], list[str]]:
        """Returns the folders that aren't valid checkpoints, and the names to try in turn."""
        return broken(self._directory), [f.name for f in candidates(self._directory)]

    def _write(self, parts: Mapping[str, LocalBlock], manifest: Manifest) -> None:
        """Writes this rank's file; the first rank commits the checkpoint of all files."""
        what = f"checkpoint of step {manifest.step} can't be written to {self._directory}"
        staged = staged_folder(self._directory, Save(manifest.step, manifest.attempt))
        failure: Exception | None = None
        try:
            if self._leads:
                require_space(self._directory, sum(map(num_bytes, manifest.tensors.values())))
                staged.mkdir()
        except OSError as error:
            failure = error
        self._agree(failure, what)
        written = None
        try:
            written = _write_file(staged, parts, advanced=self._advance)
        except Exception as error:
            failure = error
        gathered: list[Any] | None = [None] * dist.get_world_size() if self._leads else None
        dist.gather_object((written, rank_failure(failure)), gathered, dst=0, group=self._group)
        if gathered is not None:
            try:
                if problems := [problem for _, problem in gathered if problem]:
                    raise min(problems).error()
                manifest = complete(manifest, [written for written, _ in gathered])
                folder = commit(self._directory, staged, manifest)
                size = sum(entry.size for entry in manifest.files.values())
                self._event(EventKind.save, step=manifest.step, checkpoint=folder.name, bytes=size)
                self._good(folder, manifest)
            except Exception as error:
                failure = error
                shutil.rmtree(staged, ignore_errors=True)
        self._agree(failure, what)

    def _tidy(self, writing: Future[None]) -> None:
        """Deletes old checkpoints, once the newest one has been read back and is good."""
        if writing.exception() is not None:
            return  # on all ranks: there is no newer checkpoint
        problem, old, manifest = self._from_first(self._to_tidy)
        if problem:
            raise problem.error(f"old checkpoints of {self._directory} can't be found")
        if not old:
            return
        newest = self._directory / folder_name(manifest.step)
        failure: Exception | None = None
        try:
            for name in sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]:
                forget_cached(newest / name)
            verify_files(
                newest,
                manifest,
                part=dist.get_rank(),
                parts=dist.get_world_size(),
                advanced=self._advance,
            )
        except (CheckpointError, OSError) as error:
            failure = error
        problems = self._problems(failure)
        if self._leads and problems:  # so the older ones stay
            self._damaged.add(Save(manifest.step, manifest.attempt))
            self._event(
                EventKind.checkpoint_rejected, reason=problems[0].reason, checkpoint=newest.name
            )
        elif self._leads:
            try:
                busy = self._in_use()
                free = [save for save in old if folder_name(save.step) not in busy]
                delete(self._directory, free, attempt=self._attempt)
            except Exception as error:
                failure = error
        self._agree(failure if not problems else None, f"{self._directory} can't be tidied")

    def _to_tidy(self) -> tuple[RankFailure | None, list[Save], Manifest | None]:
        """Returns a failure, or what may be deleted and the newest checkpoint's manifest."""
        try:
            delete(self._directory, [], attempt=self._attempt)
            found = saves(self._directory)
            old = to_delete(
                found,
                keep_last=self._settings.keep_last,
                keep_every=self._settings.keep_every,
                damaged=self._damaged,
            )
            if not old:
                return None, [], None
            newest = in_order(found)[0][0]
            manifest = read_manifest(self._directory / folder_name(newest.step))
            return None, old, replace(manifest, tensors={})  # may be many, and aren't needed
        except Exception as error:
            return rank_failure(error), [], None

    def _agree(self, failure: Exception | None, what: str) -> None:
        """Raises CheckpointError on every rank if any of them failed."""
        if problems := self._problems(failure):
            raise min(problems).error(what) from failure

    def _problems(self, failure: Exception | None) -> list[RankFailure]:
        return [problem for problem in self._gather(rank_failure(failure)) if problem]

    def _gather(self, own: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own, group=self._group)
        return gathered

    def _from_first(self, work: Callable[[], Any]) -> Any:
        """Returns on every rank what the first one's work returns."""
        told = [work() if self._leads else None]
        dist.broadcast_object_list(told, src=0, group=self._group)
        return told[0]

    def _require_shared(self) -> None:
        """Raises CheckpointError where the ranks don't all see the same folder."""
        marker = self._directory / f".shared_{self._attempt}"
        failure: Exception | None = None
        if self._leads:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                marker.touch()
            except OSError as error:
                failure = error
        self._agree(failure, f"{self._directory} can't be written to")
        try:
            marker.stat()
        except OSError as error:
            failure = OSError(
                f"rank {dist.get_rank()} does not see what rank 0 wrote there: run.dir must be a "
                f"folder that all machines share ({error})"
            )
        try:
            self._agree(failure, f"{self._directory} is not one folder for all ranks")
        finally:
            if self._leads:
                marker.unlink(missing_ok=True)


def _read_for_all(folder: Path) -> tuple[RankFailure | None, Manifest | None]:
    """Returns a failure, or a folder's manifest."""
    try:
        return None, read_to_send(folder)
    except Exception as error:
        return rank_failure(error), None


def _write_file(
    staged: Path, parts: Mapping[str, LocalBlock], *, advanced: Callable[[], None]
) -> Written:
    """Writes a rank's parts into its own file."""
    # Wide elements first, so that all begin at a multiple of their size.
    names = sorted(parts, key=lambda name: (-parts[name].local.element_size(), name))
    file = f"rank_{dist.get_rank():05d}.safetensors"
    entries = {n: (parts[n].local.dtype, tuple(parts[n].local.shape)) for n in names}
    with TensorFileWriter(staged / file, entries) as writer:
        for name in names:
            writer.write(name, parts[name].local)
            advanced()
    sync(staged)  # on each machine that has written into it
    blocks = {name: as_block(parts[name]) for name in names}
    return Written(file=file, entry=writer.entry, blocks=blocks)
