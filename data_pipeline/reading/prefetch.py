"""Prefetching: threads read batches ahead, without changing what is returned.

Owns the threads and the bound on batches held. Leaves the definition of a batch to `batches`.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from data_pipeline.reading.batches import Batch


class ReadsBatches(Protocol):
    """A reader of batches that can be prefetched; several threads may call `read`."""

    global_batch_size: int

    def read(self, first_sample: int, *, rank: int, num_ranks: int) -> Batch:
        """Rank's slice of the global batch that starts at global sample index."""
        ...


class Prefetcher:
    """Reads a rank's batches from `first_sample` on, up to `prefetch_batches` of them ahead.

    `num_workers` threads read whole batches; with 0 the caller reads, and nothing is read ahead.
    Neither number changes the batches. Use from one thread; end with `close()`.
    """

    def __init__(
        self,
        batches: ReadsBatches,
        *,
        first_sample: int,
        rank: int,
        num_ranks: int,
        num_workers: int,
        prefetch_batches: int,
    ) -> None:
        self._batches = batches
        self._rank = rank
        self._num_ranks = num_ranks
        self._threads = ThreadPoolExecutor(num_workers, "prefetch") if num_workers else None
        self._num_ahead = prefetch_batches
        self._next_sample = first_sample
        self._ahead: deque[Future[Batch]] = deque()
        self._fill()

    def read(self, first_sample: int) -> Batch:
        """The rank's slice of the global batch that starts at global sample index.

        Any index other than the next one discards what was read ahead. Raises what reading this
        batch raised; later batches can still be read.
        """
        if self._threads is None:
            return self._read(first_sample)
        if first_sample != self._next_sample:
            self._drop()
            self._next_sample = first_sample
            self._fill()
        batch = self._ahead.popleft()
        self._next_sample += self._batches.global_batch_size
        self._fill()
        return batch.result()

    def close(self) -> None:
        """Ends the threads, after waiting for the batches that they are reading."""
        self._drop()
        if self._threads is not None:
            self._threads.shutdown()

    def _fill(self) -> None:
        while self._threads is not None and len(self._ahead) < self._num_ahead:
            sample = self._next_sample + len(self._ahead) * self._batches.global_batch_size
            self._ahead.append(self._threads.submit(self._read, sample))

    def _drop(self) -> None:
        for batch in self._ahead:
            batch.cancel()
        self._ahead.clear()

    def _read(self, first_sample: int) -> Batch:
        return self._batches.read(first_sample, rank=self._rank, num_ranks=self._num_ranks)
