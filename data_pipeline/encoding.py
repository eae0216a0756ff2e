"""Encoding: documents to token ids, by as many processes as are asked for, in the order they came.

Owns the processes and what travels between them. Leaves what a document is to `corpora`, and what
becomes of its tokens to `builder`.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.corpora import Document
from data_pipeline.tokenizers import Tokenizer, tokenizer_named

# Large enough that sending costs little beside encoding, small enough to share out a small corpus.
_BATCH_BYTES = 256 * 1024
_BATCHES_AHEAD = 4  # for each process, so that none waits for the writer


def encoded_documents(
    documents: Iterable[Document], *, tokenizer: Tokenizer, num_processes: int
) -> Iterator[tuple[Document, NDArray[np.integer]]]:
    """Each document with its token ids [num_tokens], the end of the document included.

    With more than one process a script that calls this must guard its own start with
    `if __name__ == "__main__"`, as `multiprocessing` asks.
    """
    if num_processes == 1:
        for document in documents:
            yield document, _encoded(document.text, tokenizer=tokenizer)
        return
    # Spawned, not forked: the caller may hold threads and locks, of torch or of Ray.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_live_with_parent
    ) as pool:
        ahead: deque[tuple[list[Document], Future[list[NDArray[np.integer]]]]] = deque()
        try:
            for batch in _batches(documents):
                texts = [document.text for document in batch]
                ahead.append((batch, pool.submit(_encoded_batch, texts, tokenizer.name)))
                if len(ahead) >= num_processes * _BATCHES_AHEAD:
                    yield from _next_of(ahead)
            while ahead:
                yield from _next_of(ahead)
        finally:
            pool.shutdown(cancel_futures=True)


def num_encoding_processes(tokenizer: Tokenizer, *, asked: int | None) -> int:
    """How many processes tokenise: as many as asked for, else what the tokenizer needs."""
    if asked is not None:
        return asked
    if not tokenizer.needs_processes:
        return 1
    if hasattr(os, "sched_getaffinity"):  # Linux: the cores that a container or a job left us
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _next_of(
    ahead: deque[tuple[list[Document], Future[list[NDArray[np.integer]]]]],
) -> Iterator[tuple[Document, NDArray[np.integer]]]:
    batch, encoded = ahead.popleft()
    yield from zip(batch, encoded.result(), strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += len(document.content)
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _live_with_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends this process when the parent is gone, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in processes of the pool only"

    def end_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_after_parent, daemon=True).start()


def _encoded_batch(texts: list[str], tokenizer_name: str) -> list[NDArray[np.integer]]:
    tokenizer = _tokenizer_of_process(tokenizer_name)
    return [_encoded(text, tokenizer=tokenizer) for text in texts]


@lru_cache(maxsize=1)
def _tokenizer_of_process(name: str) -> Tokenizer:
    return tokenizer_named(name)


def _encoded(text: str, *, tokenizer: Tokenizer) -> NDArray[np.integer]:
    ids = tokenizer.encode(text)
    return np.append(ids, np.array([tokenizer.end_of_document], dtype=ids.dtype))
