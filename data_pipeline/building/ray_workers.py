"""Workers on a Ray cluster: a task for each part, on whichever node has a free core.

Owns the data pipeline's only import of ray. Every node must see the text and the folder that is
built under the same paths, and needs this package.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from data_pipeline.commands.shell import text_setting
from data_pipeline.settings import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

_ANSWER_SECONDS = 10.0
_TASKS_AHEAD = 2  # per core, so that none waits for this process


class RayTasks:
    """Tasks of a Ray cluster that this process is connected to.

    At most `num_tasks` run at a time; None: as many as the cluster has cores. Ray starts a task
    again, on another node, if its node is lost: what a task writes appears complete or not at all.
    """

    def __init__(self, job: Any, *, num_tasks: int | None) -> None:
        import ray

        self._ray = ray
        self._job = ray.put(job)
        self._num_tasks = num_tasks

    def results(
        self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]
    ) -> Iterator[tuple[Task, Result]]:
        """Yields each task with its result; raises what the function raises."""
        ray = self._ray
        remote = ray.remote(function).options(
            num_cpus=1, max_retries=-1, name=f"moetrain data build: {function.__name__}"
        )
        running: dict[Any, Task] = {}
        for task in tasks:
            while len(running) >= self._most():
                yield from self._finished(running)
            running[remote.remote(self._job, task)] = task
        while running:
            yield from self._finished(running)

    def _most(self) -> int:
        if self._num_tasks is not None:
            return self._num_tasks
        # Asked each time: nodes join and leave.
        return _TASKS_AHEAD * max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def _finished(self, running: dict[Any, Task]) -> Iterator[tuple[Task, Any]]:
        for result in self._ray.wait(list(running), num_returns=1)[0]:
            try:
                yield running.pop(result), self._ray.get(result)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error


def _require_answer(address: str) -> None:
    """Raises OSError if nothing listens at host:port: Ray would try for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()


@contextmanager
def ray_workers(job: Any, *, address: str | None, num_tasks: int | None) -> Iterator[RayTasks]:
    """Tasks on a cluster: at an address, else that of RAY_ADDRESS, else the one of this machine.

    Raises DataError if there is none.
    """
    import ray

    connected = not ray.is_initialized()
    if connected:
        try:
            _require_answer(address or os.environ.get("RAY_ADDRESS") or "auto")
            ray.init(address or "auto", log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError) as error:
            where = f"ray_address={address!r}" if address else "RAY_ADDRESS or this machine"
            raise DataError(
                f"on='ray': no Ray cluster answers at {where}: {error}; start one with `ray start` "
                f"(in token mode RAY_AUTH_MODE=token must be set here, too), name it with "
                f"{text_setting('ray_address', 'HOST:PORT')}, or leave on=ray out"
            ) from error
    try:
        yield RayTasks(job, num_tasks=num_tasks)
    finally:
        if connected:
            ray.shutdown()
