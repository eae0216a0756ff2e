"""Workers: the same function for many tasks, in this process or in several of this machine.

Owns starting and ending the processes. Leaves those of a Ray cluster to `ray_workers`.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from data_pipeline.building.encoding import (
    UNGUARDED,
    kill_processes,
    require_guarded_script,
    start_process,
    submitted,
)

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_AHEAD = 2  # per process, so that none waits for the caller

_of_process: list[Any] = []  # in a process of the pool, the job that it was started with


class Workers(Protocol):
    """Runs a function for tasks, each with the job that the workers were started for."""

    def results(
        self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]
    ) -> Iterator[tuple[Task, Result]]:
        """Yields each task with its result, in any order; raises what the function raises."""
        ...


class Here:
    """This process does the work."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def results(
        self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]
    ) -> Iterator[tuple[Task, Result]]:
        """Yields each task with its result, in order."""
        for task in tasks:
            yield task, function(self._job, task)


class Processes:
    """Processes of this machine; use as a context manager.

    The calling script must guard its entry point with `if __name__ == "__main__"`.
    """

    def __init__(self, job: Any, *, num_processes: int) -> None:
        require_guarded_script()
        self._num_ahead = num_processes * _TASKS_AHEAD
        self._pool = ProcessPoolExecutor(
            num_processes,
            # Spawned, not forked: the caller may hold threads and locks of torch or Ray.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(job,),
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
        if error is not None:  # what they work on is of no use any more
            kill_processes(self._pool)
        self._pool.shutdown(cancel_futures=True)

    def results(
        self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]
    ) -> Iterator[tuple[Task, Result]]:
        """Yields each task with its result; ChildProcessError if a process was killed."""
        try:
            yield from self._results(function, tasks)
        except BrokenProcessPool as error:
            if self._started.exception() is not None:
                raise ChildProcessError(
                    f"no process that builds could begin; what ended it stands above. {UNGUARDED}"
                ) from error
            raise ChildProcessError(
                "a process that builds was killed, as for want of memory; give fewer with "
                "num_processes=…"
            ) from error

    def _results(
        self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]
    ) -> Iterator[tuple[Task, Result]]:
        running: dict[Future[Result], Task] = {}
        for task in tasks:
            running[submitted(self._pool, _in_process, function, task)] = task
            if len(running) >= self._num_ahead:
                yield from _finished(running)
        while running:
            yield from _finished(running)


@contextmanager
def started_workers(job: Any, *, num_workers: int) -> Iterator[Workers]:
    """As many workers of this machine; one is this process itself."""
    if num_workers == 1:
        yield Here(job)
        return
    with Processes(job, num_processes=num_workers) as workers:
        yield workers


def _finished(running: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def _start(job: Any) -> None:
    start_process()
    _of_process.append(job)


def _in_process(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_of_process[0], task)
