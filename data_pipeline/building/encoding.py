"""Encoding: documents to token ids, in the order of the input, by as many processes as requested.

Owns the processes and the data sent between them. Leaves the definition of a document to `corpora`,
and the use of its tokens to `builder`.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.commands.stops import INSISTENT
from data_pipeline.extensions import load_extensions
from data_pipeline.settings import DataError
from data_pipeline.tokenizers.named import tokenizer_again
from data_pipeline.tokenizers.tokenizer import TOKENIZERS, Tokenizer, token_dtype

# Large enough that sending costs little compared to encoding, small enough to divide a small
# corpus.
_BATCH_BYTES = 256 * 1024
_BATCH_DOCUMENTS = 4096
_BATCHES_AHEAD = 4  # per process, so that none waits for the writer

UNGUARDED = (
    'A script that builds shards must do so below `if __name__ == "__main__":`, since each '
    "process that tokenises imports it; or give num_processes=1, and there are none"
)

_Tag = TypeVar("_Tag")
_Tokens = NDArray[np.integer]

# In a process of the pool, the tokenizer that it was started with; empty elsewhere. The pool offers
# no other place for it, and a definition of megabytes can't be sent with each batch.
_of_process: list[Tokenizer] = []


def require_guarded_script() -> None:
    """Raises DataError in a process that `multiprocessing` has started and that is still starting.

    Such a process first imports its parent's script. A script that does its work at import would
    repeat all of it there, and each process would wait for the other.
    """
    # The check that `multiprocessing` itself uses.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DataError(UNGUARDED)


class Encoder:
    """Encodes documents with one tokenizer, in processes that can be reused for several sources.

    The processes start at once, so that they start while the caller does other work. Use as a
    context manager, or end with `close()`. With no processes the caller encodes. With processes,
    the calling script must guard its entry point with `if __name__ == "__main__"`, as
    `multiprocessing` requires.
    """

    def __init__(self, tokenizer: Tokenizer, *, num_processes: int) -> None:
        self._tokenizer = tokenizer
        self._num_ahead = num_processes * _BATCHES_AHEAD
        self._pool: ProcessPoolExecutor | None = None
        if num_processes:
            require_guarded_script()
            self._pool = ProcessPoolExecutor(
                num_processes,
                # Spawned, not forked: the caller may hold threads and locks of torch or Ray.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_process,
                initargs=(
                    tokenizer.name,
                    tokenizer.definition,
                    tokenizer.end_of_document,
                    None if tokenizer.definition else TOKENIZERS.module_of(tokenizer.name),
                ),
            )
            self._started = submitted(self._pool, int)  # any work starts the first process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encoded(
        self, documents: Iterable[tuple[_Tag, bytes | None]]
    ) -> Iterator[tuple[_Tag, _Tokens | None]]:
        """Yields each tag with its document's token ids [num_tokens], end of document included.

        Documents are UTF-8. A document that is None, because it was written before, is returned as
        None in the same position. Raises ChildProcessError if a process of the pool was killed or
        none started.
        """
        try:
            yield from self._encoded(documents)
        except BrokenProcessPool as error:
            assert self._pool is not None
            kill_processes(self._pool)
            if self._started.exception() is not None:
                raise ChildProcessError(
                    "no process that tokenises could begin; what ended it stands above. "
                    + UNGUARDED
                ) from error
            raise ChildProcessError(
                "a process that tokenises was killed, as for want of memory; give fewer with "
                "num_processes=…"
            ) from error

    def _encoded(
        self, documents: Iterable[tuple[_Tag, bytes | None]]
    ) -> Iterator[tuple[_Tag, _Tokens | None]]:
        ahead: deque[tuple[list[tuple[_Tag, bool]], Future[tuple[_Tokens, list[int]]]]] = deque()
        for batch in _batches(documents):
            contents = [content for _, content in batch if content is not None]
            tags = [(tag, content is not None) for tag, content in batch]
            if self._pool is None:
                yield from _in_order(tags, *_encoded(contents, tokenizer=self._tokenizer))
                continue
            ahead.append((tags, submitted(self._pool, _encoded_in_process, contents)))
            if len(ahead) >= self._num_ahead:
                tags, future = ahead.popleft()
                yield from _in_order(tags, *future.result())
        for tags, future in ahead:
            yield from _in_order(tags, *future.result())


def num_encoding_processes(tokenizer: Tokenizer, *, asked: int | None) -> int:
    """How many processes tokenise besides the caller: `asked`, else as many as are useful."""
    if asked is not None:
        return asked if asked > 1 else 0
    return num_cores() if tokenizer.needs_processes else 0


def num_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: the cores that a container or a job may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _batches(
    documents: Iterable[tuple[_Tag, bytes | None]],
) -> Iterator[list[tuple[_Tag, bytes | None]]]:
    batch: list[tuple[_Tag, bytes | None]] = []
    num_bytes = 0
    for tag, content in documents:
        batch.append((tag, content))
        num_bytes += len(content or b"")
        if num_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _in_order(
    tags: list[tuple[_Tag, bool]], tokens: _Tokens, ends: list[int]
) -> Iterator[tuple[_Tag, _Tokens | None]]:
    spans = zip([0, *ends], ends, strict=False)
    for tag, is_there in tags:
        yield tag, tokens[slice(*next(spans))] if is_there else None


def _encoded(contents: list[bytes], *, tokenizer: Tokenizer) -> tuple[_Tokens, list[int]]:
    """The tokens [num_tokens] of documents, each with its end, and each document's end offset."""
    dtype = token_dtype(tokenizer.vocab_size)
    end_of_document = np.array([tokenizer.end_of_document], dtype)
    parts, ends, num_tokens = [np.array([], dtype)], [], 0
    for content in contents:
        ids = tokenizer.encode(content.decode("utf-8"))
        parts += [ids, end_of_document]
        num_tokens += len(ids) + 1
        ends.append(num_tokens)
    return np.concatenate(parts), ends  # one array: many would take longer to send than to make


def submitted(pool: ProcessPoolExecutor, work: Callable[..., Any], *given: Any) -> Future[Any]:
    """Submits work. A process started by this ignores stop signals from the beginning.

    A scheduler's SIGTERM and a Ctrl-C are sent to the whole process group, to which a new process
    belongs until it begins its work.
    """
    resource_tracker.ensure_running()  # which would unblock the signals that are blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INSISTENT)
    try:
        return pool.submit(work, *given)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_processes(pool: ProcessPoolExecutor) -> None:
    """Ends a pool's processes at once.

    A broken pool asks those that are left by SIGTERM and waits for them, and one that only begins
    discards that.
    """
    for process in list((pool._processes or {}).values()):
        process.kill()


def start_process() -> None:
    """Ignores stop signals, and ends this process when the parent ends, killed or not."""
    os.setpgrp()  # Ctrl-C and a scheduler's SIGTERM are sent to the whole process group
    for signum in (signal.SIGUSR1, signal.SIGHUP):  # and Slurm's warning to each of a job
        signal.signal(signum, signal.SIG_IGN)
    for signum in INSISTENT:
        signal.signal(signum, signal.SIG_IGN)  # discards a pending one
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
        signal.signal(signum, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in processes of the pool only"

    def end_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_after_parent, daemon=True).start()
    # One process per core is enough; the package `tokenizers` would start as many threads in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _start_process(
    name: str, definition: str | None, end_of_document: int, extension: str | None
) -> None:
    start_process()
    load_extensions([extension] if extension else [])
    _of_process.append(
        tokenizer_again(name, definition=definition, end_of_document=end_of_document)
    )


def _encoded_in_process(contents: list[bytes]) -> tuple[_Tokens, list[int]]:
    return _encoded(contents, tokenizer=_of_process[0])
