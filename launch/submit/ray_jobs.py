"""The part of Ray's job server that a submission needs: submit, state, log, stop.

Owns the import of Ray's job client. Uses only HTTP to the head node's dashboard, so that this
machine needs no other access to the cluster.
"""

import asyncio
import logging
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from data_pipeline.quantities import binary_size
from launch.on_ray.access import is_loopback, send_tokens
from launch.on_ray.private import MOST_WORKING_DIR_BYTES, AuthenticationTokenLoader

REQUEST_TIMEOUT_SECONDS = (10.0, 120.0)  # to connect, and between two parts of an answer


class JobsUnavailable(Exception):
    """A job server that can't be reached now, but may be later."""


class JobRefused(Exception):
    """A request that a job server or Ray's client refuses, with its reason."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of a job."""

    ended: bool
    stopped: bool
    """Whether it ended because a stop was requested; then Ray knows no exit code."""
    exit_code: int | None
    message: str
    node: str | None
    """The node of its driver."""
    driver_pid: int | None
    """The process that has connected to Ray, once it has."""


class RayJobs:
    """The job server of a cluster."""

    def __init__(self, address: str) -> None:
        """Connects to http://host:port, the address that `ray start` prints, or `auto`."""
        _send_token_if_any()
        logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)
        with _environment_without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"), _translated():
            self._client = _Client(address)
        self.address = self._client.get_address()

    def is_open(self) -> bool:
        """Returns whether the server answers without a token and other machines can reach it."""
        if is_loopback(f"{urlsplit(self.address).hostname}:"):
            return False
        question = f"{self.address}/api/jobs/"
        try:
            with urllib.request.urlopen(question, timeout=REQUEST_TIMEOUT_SECONDS[0]):
                return True
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return False
            raise JobsUnavailable(f"{self.address}: {error}") from error
        except OSError as error:
            raise JobsUnavailable(f"{self.address}: {error}") from error

    def is_on_this_machine(self) -> bool:
        """Returns whether the head node runs here and not behind a tunnel: then its folder is
        here."""
        with _translated():
            session = self._client.session_name()
        places = {os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp"} - {None}
        return any(Path(str(place), "ray", session).is_dir() for place in places)

    def submit(
        self,
        entrypoint: str,
        *,
        working_dir: Path | None,
        excludes: list[str],
        env: dict[str, str],
    ) -> str:
        """Submits a shell command and a folder to copy to every node; returns the job's id."""
        runtime_env: dict[str, Any] = {"env_vars": env}
        if working_dir:
            runtime_env |= {"working_dir": str(working_dir), "excludes": excludes}
        with _translated():
            return self._client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)

    def state(self, job: str) -> JobState:
        """Returns a job's state; raises JobRefused for an unknown one."""
        with _translated():
            details: JobDetails = self._client.get_job_info(job)
        info = details.driver_info
        return JobState(
            ended=details.status.is_terminal(),
            stopped=details.status == JobStatus.STOPPED,
            exit_code=0 if details.status == JobStatus.SUCCEEDED else details.driver_exit_code,
            message=details.message or "",
            node=details.driver_node_id,
            driver_pid=int(info.pid) if info else None,
        )

    def stop(self, job: str) -> None:
        """Makes Ray send SIGTERM to every process of a job."""
        with _translated():
            self._client.stop_job(job)

    def signal_driver(self, state: JobState) -> None:
        """Sends SIGTERM to a job's driver, from a second job: Ray sends its own only once."""
        assert state.driver_pid is not None
        with _translated():
            self._client.submit_job(
                entrypoint=f"kill -TERM {state.driver_pid}",
                entrypoint_label_selector={"ray.io/node-id": state.node} if state.node else None,
            )

    def log(self, job: str) -> str:
        """Returns all that a job has written so far."""
        with _translated():
            return str(self._client.get_job_logs(job))

    def follow(self, job: str, show: Callable[[str], None]) -> None:
        """Yields a job's output from its beginning, until the job ends."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job):
                show(text)

        with _translated():
            asyncio.run(tail())


class _Client(JobSubmissionClient):
    """Ray's client, with timeouts: Ray's own would wait forever on a network that was cut."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
        size = len(kwargs.get("data") or b"")
        if size > MOST_WORKING_DIR_BYTES:
            raise JobRefused(
                f"the folder to be copied has {binary_size(size)}, and Ray's job server takes "
                f"{binary_size(MOST_WORKING_DIR_BYTES)}: move large files out of it, or "
                "name them in its .gitignore or .rayignore"
            )
        return super()._do_request(method, endpoint, timeout=REQUEST_TIMEOUT_SECONDS, **kwargs)

    def session_name(self) -> str:
        answer = self._do_request("GET", "/api/version")
        return str(answer.json()["session_name"])


@contextmanager
def _translated() -> Iterator[None]:
    """Translates the many errors of Ray's client and its libraries into two."""
    try:
        yield
    except AuthenticationError as error:
        raise JobRefused(
            "the cluster requires a token: set RAY_AUTH_TOKEN, or copy the head node's "
            "~/.ray/auth_token here"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise JobRefused(str(error)) from error
    except OSError as error:  # requests' and aiohttp's errors of connections among them
        raise JobsUnavailable(str(error) or type(error).__name__) from error


@contextmanager
def _environment_without(*names: str) -> Iterator[None]:
    """Hides variables that would override the given address."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before


def _send_token_if_any() -> None:
    """Makes Ray's client send this machine's token, unless the environment says otherwise."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    if AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        send_tokens()
