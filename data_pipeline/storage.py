"""Where the files of a shard folder come from: a disk of this machine, or a server.

Owns the only import of fsspec and of its parts for each protocol, the retries, and verifying
downloads. Leaves the downloaded files to `cache`, and their meaning to `reader`.

Credentials and custom servers are set in the environment, where these libraries look for them:
`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `AWS_ENDPOINT_URL` and the like for s3://,
`GOOGLE_APPLICATION_CREDENTIALS` and the like for gs://, and `FSSPEC_S3`, `FSSPEC_GS`,
`FSSPEC_HTTP` with a JSON object of any fsspec options, such as `FSSPEC_S3='{"anon": true}'`.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from data_pipeline.cache import NO_ROOM, FileCache
from data_pipeline.object_stores import is_final, new_filesystem, pause_before
from data_pipeline.settings import CacheSettings, DataError, UnavailableError, home_folder

PROTOCOLS = ("s3", "gs", "https", "http")

_PIECE_BYTES = 8 * 2**20

Result = TypeVar("Result")
_logger = logging.getLogger(__name__)


class ShardFiles(Protocol):
    """The files of one folder, by name.

    `max_mapped` is how many shards of a source should be open at a time, None for as many as the
    process may open: an open file takes space on the disk even after the cache has deleted it.
    """

    max_mapped: int | None

    @property
    def location(self) -> str:
        """The folder's name in messages; contains no secrets."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """A small file's current content; FileNotFoundError, or DataError if unreadable."""
        ...

    def check(self, name: str, *, size: int) -> None:
        """Raises DataError if a file is known, without a request, to be wrong."""
        ...

    def open(self, name: str, *, size: int, sha256: str) -> BufferedReader:
        """A file of this size, open for reading, on a disk of this machine.

        A downloaded file is verified against `sha256`; any other is checked by its reader. Raises
        DataError naming the file, and what was found instead.
        """
        ...


def open_files(folder: str, *, cache: CacheSettings) -> ShardFiles:
    """The files of a folder: a path, or a URL of one of `PROTOCOLS`.

    Raises DataError for any other protocol, `pipe:` included, and if a library is missing.
    """
    protocol, separator, _ = folder.partition("://")
    if folder.startswith("pipe:") or (separator and "/" not in protocol):
        if protocol not in PROTOCOLS:
            raise DataError(
                f"{without_secrets(folder)!r} is neither a path nor a URL that shards are read "
                f"from; those begin with {', '.join(f'{name}://' for name in PROTOCOLS)}"
            )
        return RemoteFiles(folder, cache=cache)
    return LocalFiles(Path(folder))


class LocalFiles:
    """The files of a folder on a disk of this machine."""

    max_mapped: int | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    @property
    def location(self) -> str:
        """The folder's absolute path."""
        return str(self._folder)

    def read_bytes(self, name: str) -> bytes:
        """A whole file; raises FileNotFoundError if it is missing."""
        return (self._folder / name).read_bytes()

    def check(self, name: str, *, size: int) -> None:
        """Raises DataError if a file is missing or has another size."""
        path = self._folder / name
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise DataError(
                f"{path} is missing (expected {size} bytes); restore it, or build the folder again"
            ) from None
        if found != size:
            raise DataError(
                f"{path} has {found} bytes and should have {size}; restore it, or build the "
                "folder again"
            )

    def open(self, name: str, *, size: int, sha256: str) -> BufferedReader:
        """The file itself; its size is checked here, its bytes by the reader."""
        self.check(name, size=size)
        return (self._folder / name).open("rb")


class RemoteFiles:
    """The files of a folder at a URL, downloaded when needed and kept in a bounded cache."""

    max_mapped: int | None = 8

    def __init__(self, folder: str, *, cache: CacheSettings) -> None:
        self._folder = folder.rstrip("/")
        self._protocol = folder.partition("://")[0]
        self._settings = cache
        self._cache = FileCache(cache_folder(cache), max_bytes=int(cache.max_gib * 2**30))
        self._filesystems = {os.getpid(): self._new_filesystem()}

    @property
    def location(self) -> str:
        """The folder's URL without user, password and query."""
        return without_secrets(self._folder)

    def read_bytes(self, name: str) -> bytes:
        """A whole file, requested each time; raises FileNotFoundError if it is missing."""
        url = self._url(name)
        return self._tried(url, lambda: b"".join(self._pieces(url, None)))

    def check(self, name: str, *, size: int) -> None:
        """Raises UnavailableError if the cache is smaller than a file; checks nothing else."""
        if size > self._settings.max_gib * 2**30:
            raise UnavailableError(
                f"{name} of {self.location} has {size} bytes, more than the whole cache: raise "
                f"data.cache.max_gib={self._settings.max_gib:g}"
            )

    def open(self, name: str, *, size: int, sha256: str) -> BufferedReader:
        """The file in the cache, downloaded and verified if it isn't there yet."""
        url = self._url(name)

        def download(file: BinaryIO) -> None:
            try:
                self._tried(url, lambda: self._download(url, file, size=size, sha256=sha256))
            except FileNotFoundError:
                raise DataError(
                    f"{without_secrets(url)} is missing (expected {size} bytes); restore it, or "
                    "build the folder again"
                ) from None

        return self._cache.open(sha256, size=size, name=without_secrets(url), write=download)

    def _download(self, url: str, file: BinaryIO, *, size: int, sha256: str) -> None:
        file.seek(0)
        digest, found = hashlib.sha256(), 0
        for piece in self._pieces(url, size):
            found += len(piece)
            if found > size:
                break
            digest.update(piece)
            file.write(piece)
        if found != size:
            many = f"more than {size}" if found > size else str(found)
            raise _WrongBytesError(f"{many} bytes were sent and {size} were expected")
        if digest.hexdigest() != sha256:
            raise _WrongBytesError(f"its SHA-256 is {digest.hexdigest()} and should be {sha256}")

    def _pieces(self, url: str, size: int | None) -> Iterator[bytes]:
        """A file's bytes in order, at most `size` of them if it is given.

        Raises what the library for the protocol raises, and TimeoutError if no data arrives.
        """
        from fsspec.asyn import sync

        filesystem, seconds = self._filesystem(), self._settings.timeout_seconds

        def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            return sync(filesystem.loop, function, *args, timeout=seconds, **options)

        if self._protocol in ("http", "https"):
            import aiohttp

            # One stream, since many servers don't support ranges. By default aiohttp would end it
            # after five minutes, even if data still arrives; here each read has its own timeout.
            # Options given to open_async() would be lost.
            stream = call(lambda: filesystem.open_async(url, size=0))
            stream.kwargs = {**filesystem.kwargs, "timeout": aiohttp.ClientTimeout(total=None)}
            try:
                while piece := call(stream.read, _PIECE_BYTES):
                    yield piece
            finally:
                call(stream.close)
        elif size is None:
            yield call(filesystem._cat_file, url)
        else:
            for start in range(0, size, _PIECE_BYTES):
                end = min(start + _PIECE_BYTES, size)
                piece = call(filesystem._cat_file, url, start=start, end=end)
                yield piece
                if len(piece) != end - start:
                    return

    def _tried(self, url: str, work: Callable[[], Result]) -> Result:
        """Returns the result of `work`, which is retried after transient errors."""
        num_tries = self._settings.num_retries + 1
        for number in range(1, num_tries + 1):
            try:
                return work()
            except (DataError, TypeError, AttributeError):  # the last two: bugs
                raise
            except Exception as error:
                if getattr(error, "errno", None) in NO_ROOM:
                    raise
                # Not `from error`: its own text may contain the URL with all secrets.
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(without_secrets(url)) from None
                why = self._reason(error)
                if is_final(error):
                    raise UnavailableError(
                        f"{without_secrets(url)} can't be read: {why}; check the address and "
                        "credentials"
                    ) from None
                if number == num_tries:
                    what = f"{without_secrets(url)} can't be read, tried {number} times: {why}"
                    if isinstance(error, _WrongBytesError):
                        raise DataError(f"{what}; restore it, or build the folder again") from None
                    raise UnavailableError(
                        f"{what}; see to the server or the network, or raise data.cache.num_retries"
                    ) from None
                pause = pause_before(number, first_seconds=self._settings.pause_seconds)
                _logger.warning("%s: %s; trying again in %.1f s", without_secrets(url), why, pause)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"nothing came for {self._settings.timeout_seconds:g} s"
        return f"{type(error).__name__}: {without_secrets(str(error))}"

    def _url(self, name: str) -> str:
        if self._protocol not in ("http", "https"):
            return f"{self._folder}/{name}"
        parts = urlsplit(self._folder)  # a query, such as a signature, is sent with every file
        return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()

    def _filesystem(self) -> Any:
        """fsspec's filesystem; a forked process has its own, because it lacks the parent's threads.

        The parent's is kept there unused: closing it would remove the parent's connections from the
        event loop that both still share.
        """
        process = os.getpid()
        if process not in self._filesystems:
            self._filesystems[process] = self._new_filesystem()
        return self._filesystems[process]

    def _new_filesystem(self) -> Any:
        try:
            return new_filesystem(self._protocol)
        except ImportError as error:
            raise DataError(
                f"{self.location}: reading {self._protocol}:// needs more packages ({error}): "
                "pip install 'moetrain[remote]'"
            ) from error


def cache_folder(settings: CacheSettings) -> Path:
    """The folder of the cache; raises DataError if none is set and there is no home folder."""
    if settings.dir is not None:
        return Path(settings.dir).absolute()
    home = home_folder()
    if home is None:
        raise DataError(
            "data.cache.dir isn't given, and there is no home folder to keep shards in (HOME isn't "
            "set, and this user has no entry in the passwd file); give data.cache.dir=DIR"
        )
    return home / ".cache" / "moetrain" / "shards"


class _WrongBytesError(Exception):
    """The downloaded bytes aren't those of the index."""


def without_secrets(text: str) -> str:
    """A text without anything in its URLs that may be secret: users, passwords and queries."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    return re.sub(r"\?[^\s'\"]*=[^\s'\"]*", "", text)
