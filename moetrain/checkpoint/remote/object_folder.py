"""A remote folder on an object store: s3:// and gs://, through fsspec.

Owns retries and timeouts.

Credentials and endpoints are set in the environment, as these libraries expect:
`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `AWS_ENDPOINT_URL` and the like for s3://,
`GOOGLE_APPLICATION_CREDENTIALS` and the like for gs://, and `FSSPEC_S3`, `FSSPEC_GS` with a JSON
object of any fsspec options.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.object_stores import is_final, new_filesystem, pause_before
from moetrain.checkpoint.manifest import CheckpointError
from moetrain.checkpoint.remote.folder import (
    SETTING,
    RemoteUnavailableError,
    Retries,
    without_credentials,
)
from moetrain.checks import ConfigError

_POLL_SECONDS = 0.2
_PIECE_BYTES = 8 * 2**20
# A multipart upload has at most 10,000 parts on S3; parts are multiples of 256 KiB on gs://.
_MOST_PARTS, _PART_STEP = 9_000, 2**18
# How stores answer that they don't support exclusive creation.
_NOT_KNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)

Result = TypeVar("Result")
_logger = logging.getLogger(__name__)


class ObjectFolder:
    """The objects below a prefix of a bucket."""

    def __init__(self, protocol: str, path: str, *, retries: Retries) -> None:
        self._protocol, self._path, self._retries = protocol, path, retries
        self._stopped = threading.Event()
        self._filesystem = self._new_filesystem()

    @property
    def location(self) -> str:
        """The URL."""
        return f"{self._protocol}://{self._path}"

    def sizes(self, below: str = "") -> dict[str, int]:
        """One listing of all objects below the prefix; today's stores list consistently."""
        prefix = f"{self._path}/{below}".rstrip("/")
        found = self._tried(prefix, lambda: self._call("_find", prefix, detail=True))
        return {
            name.removeprefix(f"{prefix}/"): int(entry["size"])
            for name, entry in found.items()
            if name.startswith(f"{prefix}/")
        }

    def read(self, name: str) -> bytes:
        """One request."""
        path = self._at(name)
        content: bytes = self._tried(path, lambda: self._call("_cat_file", path), may_miss=True)
        return content

    def write(self, name: str, data: bytes) -> None:
        """One request, which is atomic."""
        path = self._at(name)
        self._tried(path, lambda: self._call("_pipe_file", path, data))

    def create(self, name: str, data: bytes) -> bool:
        """Exclusive where the store supports it (S3, GCS, MinIO); else checks, and then writes."""
        path = self._at(name)

        def attempt() -> bool:
            try:
                self._call("_pipe_file", path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NOT_KNOWN:
                    raise
                if self._call("_find", path):
                    return False
                self._call("_pipe_file", path, data)
            return True

        return self._tried(path, attempt)

    def upload(self, name: str, path: Path) -> None:
        """A multipart upload; the object appears when it completes. Holds a few parts in memory."""
        from fsspec.callbacks import Callback

        target = self._at(name)
        part = max(_PIECE_BYTES, path.stat().st_size // _MOST_PARTS)
        part = -(-part // _PART_STEP) * _PART_STEP

        def attempt() -> None:
            sent = Callback()
            options: dict[str, Any] = {"callback": sent, "chunksize": part}
            if self._protocol == "s3":
                options["max_concurrency"] = 2
            self._call("_put_file", str(path), target, moved=lambda: sent.value, **options)

        self._tried(target, attempt)

    def pieces(self, name: str, *, start: int, stop: int) -> Iterator[bytes]:
        """Range requests, so that a broken connection costs a piece and not the file."""
        path = self._at(name)

        def piece(begin: int, end: int) -> bytes:
            found: bytes = self._tried(
                path, lambda: self._call("_cat_file", path, start=begin, end=end), may_miss=True
            )
            return found

        for begin in range(start, stop, _PIECE_BYTES):
            end = min(begin + _PIECE_BYTES, stop)
            found = piece(begin, end)
            yield found
            if len(found) != end - begin:
                return

    def delete(self, name: str) -> None:
        """One request."""
        path = self._at(name)

        def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._call("_rm_file", path)

        self._tried(path, attempt)

    def forget_uploads(self, below: str) -> None:
        """Aborts killed uploads, whose parts are billed until then (S3 only)."""
        if self._protocol != "s3":
            return
        bucket, _, prefix = self._at(below).partition("/")
        try:
            found = self._call(
                "_call_s3", "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/"
            )
            for entry in found.get("Uploads", []):
                names = {"Bucket": bucket, "Key": entry["Key"], "UploadId": entry["UploadId"]}
                self._call("_call_s3", "abort_multipart_upload", **names)
        except CheckpointError:
            raise
        except Exception as error:  # some credentials may upload but not list uploads
            _logger.info("%s: parts of killed uploads may be left: %s", self.location, error)

    def stop(self) -> None:
        """Takes effect within a fifth of a second."""
        self._stopped.set()

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _call(
        self, method: str, *args: Any, moved: Callable[[], object] = lambda: None, **options: Any
    ) -> Any:
        """Runs a coroutine of the filesystem; raises TimeoutError where it stalls.

        `moved` returns something that changes as long as the transfer makes progress.
        """
        filesystem = self._filesystem
        self._require_running()
        future = asyncio.run_coroutine_threadsafe(
            getattr(filesystem, method)(*args, **options), filesystem.loop
        )
        seen, since = moved(), time.monotonic()
        while True:
            concurrent.futures.wait([future], timeout=_POLL_SECONDS)
            if future.done():
                return future.result()
            if (now := moved()) != seen:
                seen, since = now, time.monotonic()
            if self._stopped.is_set():
                future.cancel()
                self._require_running()
            if time.monotonic() - since > self._retries.timeout_seconds:
                future.cancel()
                raise TimeoutError

    def _require_running(self) -> None:
        if self._stopped.is_set():
            raise CheckpointError(f"{self.location}: given up, since the run ends")

    def _tried(self, path: str, work: Callable[[], Result], *, may_miss: bool = False) -> Result:
        """Returns what `work` returns; retries transient failures."""
        url, last = f"{self._protocol}://{path}", self._retries.num_tries
        for number in range(1, last + 1):
            try:
                return work()
            except (CheckpointError, TypeError, AttributeError):  # the last two: bugs
                raise
            except FileNotFoundError as error:
                if may_miss or error.filename is not None:  # a local file
                    raise
                raise RemoteUnavailableError(
                    f"{url} can't be reached: {without_credentials(str(error))}; create the "
                    f"bucket, or correct {SETTING}"
                ) from None
            except Exception as error:
                why = self._reason(error)
                # Not `from error`: its text may have secrets in a URL.
                if is_final(error):
                    raise RemoteUnavailableError(
                        f"{url} can't be used: {why}; check the credentials, and that they allow "
                        "to list, read, write and delete there"
                    ) from None
                if number == last:
                    raise RemoteUnavailableError(
                        f"{url} can't be used, tried {number} times: {why}; see to the network or "
                        f"the server, or change {SETTING}"
                    ) from None
                pause = pause_before(number, first_seconds=self._retries.pause_seconds)
                _logger.warning("%s: %s; trying again in %.1f s", url, why, pause)
                self._stopped.wait(pause)
        raise AssertionError("unreachable")

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"nothing came for {self._retries.timeout_seconds:g} s"
        return f"{type(error).__name__}: {without_credentials(str(error))}"

    def _new_filesystem(self) -> Any:
        # No listing cache: another attempt may have written since.
        try:
            return new_filesystem(self._protocol, use_listings_cache=False)
        except ImportError as error:
            raise ConfigError(
                SETTING,
                self.location,
                f"{self._protocol}:// needs more packages ({error}): "
                "pip install 'moetrain[remote]'",
            ) from error
