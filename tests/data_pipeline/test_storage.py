"""Files of a folder on a server are downloaded whole and verified through a bounded cache."""

import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BufferedReader
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from data_pipeline import DataError, UnavailableError
from data_pipeline.cache import FileCache
from data_pipeline.settings import CacheSettings
from data_pipeline.storage import ShardFiles, open_files
from tests.support.servers import Fault, FileServer, file_server

# Other processes import only this module's imports; a fork would copy the server's threads.
_PROCESSES = multiprocessing.get_context("spawn")
_BODY = bytes(range(256)) * 4096


@pytest.fixture
def server() -> Iterator[FileServer]:
    pytest.importorskip("fsspec.implementations.http", reason="needs moetrain[remote]")
    with file_server() as server:
        server.files["/data/a.tar"] = _BODY
        yield server


def settings(tmp_path: Path, **changes: object) -> CacheSettings:
    """A cache of the test's own with a short timeout."""
    chosen: dict[str, Any] = {
        "dir": str(tmp_path / "cache"),
        "timeout_seconds": 0.5,
        "num_retries": 2,
        "pause_seconds": 0.01,
        **changes,
    }
    return CacheSettings(**chosen)


def remote(server: FileServer, tmp_path: Path, **changes: object) -> ShardFiles:
    return open_files(f"http://{server.address}/data", cache=settings(tmp_path, **changes))


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def read(files: ShardFiles, name: str = "a.tar", body: bytes = _BODY) -> bytes:
    """What a file that should have this body is read as."""
    with files.open(name, size=len(body), sha256=sha256(body)) as file:
        return file.read()


def cached(tmp_path: Path) -> set[str]:
    """The names in the cache, other than the lock's."""
    return {path.name for path in (tmp_path / "cache").iterdir()} - {"lock"}


# What folders may be read from


@pytest.mark.parametrize(
    "folder", ["pipe:cat x", "pipe://cat", "file:///x", "ftp://h/x", "simplecache::s3://b/x"]
)
def test_other_protocols_are_refused_with_those_there_are(folder: str) -> None:
    with pytest.raises(DataError, match="s3://, gs://, https://, http://"):
        open_files(folder, cache=CacheSettings())


def test_missing_library_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec", reason="needs moetrain[remote]")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(DataError, match=r"s3fs.*pip install 'moetrain\[remote\]'"):
        open_files("s3://bucket/data", cache=settings(tmp_path))


def test_path_with_a_colon_is_a_local_folder(tmp_path: Path) -> None:
    folder = tmp_path / "v2:text"
    folder.mkdir()
    (folder / "a.tar").write_bytes(_BODY)
    assert read(open_files(str(folder), cache=CacheSettings())) == _BODY


def test_local_file_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(_BODY[:-7])
    files = open_files(str(tmp_path), cache=CacheSettings())
    with pytest.raises(DataError, match=rf"a\.tar has {len(_BODY) - 7} bytes.*{len(_BODY)}"):
        read(files)
    with pytest.raises(DataError, match=r"b\.tar is missing"):
        files.check("b.tar", size=1)


# Downloads


def test_file_is_downloaded_once_and_then_read_from_the_cache(
    server: FileServer, tmp_path: Path
) -> None:
    assert read(remote(server, tmp_path)) == _BODY
    assert read(remote(server, tmp_path)) == _BODY
    assert server.requests["/data/a.tar"] == 1
    assert cached(tmp_path) == {sha256(_BODY)}


def test_two_folders_share_equal_files(server: FileServer, tmp_path: Path) -> None:
    server.files["/other/b.tar"] = _BODY
    other = open_files(f"http://{server.address}/other", cache=settings(tmp_path))
    assert read(remote(server, tmp_path)) == read(other, "b.tar") == _BODY
    assert server.requests["/other/b.tar"] == 0


def test_index_is_asked_for_each_time(server: FileServer, tmp_path: Path) -> None:
    files = remote(server, tmp_path)
    for body in (b"old", b"new"):
        server.files["/data/index.json"] = body
        assert files.read_bytes("index.json") == body
    with pytest.raises(FileNotFoundError):
        files.read_bytes("other.json")


def test_cached_file_that_was_cut_short_is_downloaded_again(
    server: FileServer, tmp_path: Path
) -> None:
    read(remote(server, tmp_path))
    os.truncate(tmp_path / "cache" / sha256(_BODY), 100)
    assert read(remote(server, tmp_path)) == _BODY


@pytest.mark.parametrize(
    "fault",
    [500, 503, 429, 409, *(fault for fault in Fault if fault is not Fault.SLOW)],
)
def test_fault_that_passes_is_got_over(
    fault: Fault | int, server: FileServer, tmp_path: Path
) -> None:
    server.faults["/data/a.tar"] = [fault]
    assert read(remote(server, tmp_path)) == _BODY
    assert server.requests["/data/a.tar"] == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (503, "503"),
        (Fault.CUT, "ClientPayloadError"),
        (Fault.FLIPPED, f"SHA-256 is [0-9a-f]{{64}} and should be {sha256(_BODY)}"),
        (Fault.SHORT, f"{len(_BODY) // 2} bytes were sent and {len(_BODY)} were expected"),
        (Fault.LONG, f"more than {len(_BODY)} bytes"),
        (Fault.SILENT, "nothing came for 0.2 s"),
        (Fault.STOPS_MIDWAY, "nothing came for 0.2 s"),
    ],
)
def test_fault_that_stays_ends_with_the_address_and_what_was_found(
    fault: Fault | int, said: str, server: FileServer, tmp_path: Path
) -> None:
    server.faults["/data/a.tar"] = [fault] * 9
    files = remote(server, tmp_path, timeout_seconds=0.2)
    # Wrong bytes may be skipped, a server that is out of reach never: the next rank may reach it.
    kind = DataError if fault in (Fault.FLIPPED, Fault.SHORT, Fault.LONG) else UnavailableError
    with pytest.raises(kind, match=f"{server.address}/data/a.tar .*tried 3 times: .*{said}"):
        read(files)
    assert server.requests["/data/a.tar"] == 3
    assert cached(tmp_path) == set()


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [(403, UnavailableError, "403.*credentials"), (404, DataError, "is missing")],
)
def test_refusal_is_not_tried_again(
    status: int, kind: type[Exception], said: str, server: FileServer, tmp_path: Path
) -> None:
    server.faults["/data/a.tar"] = [status]
    with pytest.raises(kind, match=said):
        read(remote(server, tmp_path))
    assert server.requests["/data/a.tar"] == 1


def test_slow_server_that_goes_on_sending_is_waited_for(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import aiohttp
    import fsspec.config

    # By default it is five minutes; that bound on a whole download must not hold.
    options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=0.5)}}
    monkeypatch.setitem(fsspec.config.conf, "http", options)
    server.faults["/data/a.tar"] = [Fault.SLOW]  # a second in all
    assert read(remote(server, tmp_path, timeout_seconds=0.5)) == _BODY
    assert server.requests["/data/a.tar"] == 1


def test_server_that_is_away_is_named(tmp_path: Path) -> None:
    pytest.importorskip("fsspec.implementations.http", reason="needs moetrain[remote]")
    with file_server() as server:
        pass
    with pytest.raises(UnavailableError, match=f"{server.address}/data/a.tar .*tried 3 times"):
        read(remote(server, tmp_path))


def test_process_ends_though_a_server_stalls(server: FileServer, tmp_path: Path) -> None:
    server.faults["/data/a.tar"] = [Fault.STOPS_MIDWAY] * 9
    program = (
        "import threading\n"
        "from data_pipeline.settings import CacheSettings\n"
        "from data_pipeline.storage import open_files\n"
        f"cache = CacheSettings(dir={str(tmp_path / 'cache')!r}, timeout_seconds=1000.0)\n"
        f"files = open_files('http://{server.address}/data', cache=cache)\n"
        f"read = lambda: files.open('a.tar', size={len(_BODY)}, sha256={sha256(_BODY)!r})\n"
        "thread = threading.Thread(target=read, daemon=True)\n"
        "thread.start()\n"
        "thread.join(1)\n"
        "assert thread.is_alive()\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)


def test_process_forked_after_a_download_downloads_too(server: FileServer, tmp_path: Path) -> None:
    server.files["/data/index.json"] = b"{}"
    program = (
        "import os\n"
        "from data_pipeline.settings import CacheSettings\n"
        "from data_pipeline.storage import open_files\n"
        f"cache = CacheSettings(dir={str(tmp_path / 'cache')!r}, num_retries=0)\n"
        f"files = open_files('http://{server.address}/data', cache=cache)\n"
        "files.read_bytes('index.json')\n"
        "child = os.fork()\n"
        "files.read_bytes('index.json')\n"
        "assert not child or os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)
    assert server.requests["/data/index.json"] == 3


def test_secrets_of_an_address_are_not_shown(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = f"http://someone:pass@{server.address}/data/?token=secret&x=1"
    files = open_files(folder, cache=settings(tmp_path))
    path = "/data/a.tar?token=secret&x=1"
    server.faults[path] = [503, Fault.CUT, 403]
    with pytest.raises(UnavailableError) as raised:
        read(files)
    assert server.requests[path] == 3
    shown = f"{raised.value} {files.location} {caplog.text}"
    assert f"http://{server.address}/data" in shown
    assert not [word for word in ("secret", "someone", "pass@") if word in shown]
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


# The cache


def _read_from(address: str, cache: CacheSettings, together: Barrier | None = None) -> None:
    files = open_files(f"http://{address}/data", cache=cache)
    if together is not None:
        together.wait()
    assert read(files) == _BODY


def test_processes_that_want_one_file_at_once_download_it_once(
    server: FileServer, tmp_path: Path
) -> None:
    server.faults["/data/a.tar"] = [Fault.SLOW]
    arguments = (server.address, settings(tmp_path), _PROCESSES.Barrier(2))
    processes = [_PROCESSES.Process(target=_read_from, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert server.requests["/data/a.tar"] == 1


def test_downloader_that_is_killed_blocks_nobody(server: FileServer, tmp_path: Path) -> None:
    server.faults["/data/a.tar"] = [Fault.STOPS_MIDWAY]
    patient = settings(tmp_path, timeout_seconds=1000.0)
    process = _PROCESSES.Process(target=_read_from, args=(server.address, patient))
    process.start()
    while not server.requests["/data/a.tar"]:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert cached(tmp_path) == {f"{sha256(_BODY)}.part"}
    assert read(remote(server, tmp_path)) == _BODY
    assert cached(tmp_path) == {sha256(_BODY)}


def _bodies(count: int, *, size: int = 1000) -> list[bytes]:
    return [bytes([number]) * size for number in range(count)]


def _opened(cache: FileCache, body: bytes) -> BufferedReader:
    def write(file: BinaryIO) -> None:
        file.write(body)

    return cache.open(sha256(body), size=len(body), name="x", write=write)


def _get(cache: FileCache, body: bytes) -> bytes:
    with _opened(cache, body) as file:
        return file.read()


def test_files_used_longest_ago_make_room_for_new_ones(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", max_bytes=3999)
    bodies = _bodies(4)
    for number in (0, 1, 2, 0, 3):
        assert _get(cache, bodies[number]) == bodies[number]
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 3999
    assert cached(tmp_path) == {sha256(bodies[number]) for number in (2, 0, 3)}


def test_who_waits_for_a_download_that_fails_downloads_by_itself(tmp_path: Path) -> None:
    cache, body = FileCache(tmp_path / "cache", max_bytes=10_000), _bodies(1)[0]
    started = threading.Event()

    def fail(file: BinaryIO) -> None:
        started.set()
        time.sleep(0.3)  # the other one comes meanwhile
        raise DataError("refused")

    def first() -> None:
        with pytest.raises(DataError, match="refused"):
            cache.open(sha256(body), size=1000, name="x", write=fail)

    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    assert _get(cache, body) == body
    thread.join()
    assert cached(tmp_path) == {sha256(body)}


def test_file_stays_readable_when_it_makes_room(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", max_bytes=1500)
    first, second = _bodies(2)
    with _opened(cache, first) as f:
        _get(cache, second)
        assert cached(tmp_path) == {sha256(second)}
        assert f.read() == first


def test_left_overs_of_dead_processes_make_room(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", max_bytes=1500)
    (tmp_path / "cache" / f"{'0' * 64}.part").write_bytes(bytes(1000))
    (tmp_path / "cache" / "somebody's file").write_bytes(bytes(1000))
    body = _bodies(1)[0]
    assert _get(cache, body) == body
    assert cached(tmp_path) == {sha256(body), "somebody's file"}


def _get_many(folder: Path, first: int) -> None:
    cache = FileCache(folder, max_bytes=5000)
    for number in range(200):
        body = _bodies(8)[(first + number * 3) % 8]
        assert _get(cache, body) == body


def test_processes_with_too_small_a_cache_get_every_file_and_keep_the_bound(
    tmp_path: Path,
) -> None:
    processes = [_PROCESSES.Process(target=_get_many, args=(tmp_path / "cache", n)) for n in (0, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 5000


def test_file_larger_than_the_cache_is_refused(server: FileServer, tmp_path: Path) -> None:
    files = remote(server, tmp_path, max_gib=0.5 / 2**10)
    with pytest.raises(UnavailableError, match=r"a\.tar has 1048576 bytes.*data\.cache\.max_gib"):
        read(files)
    assert server.requests["/data/a.tar"] == 0


@pytest.mark.parametrize(("size", "hash_"), [(1000, "../../x"), (1000, ""), (0, "0" * 64)])
def test_index_that_names_no_hash_or_size_is_refused(
    size: int, hash_: str, server: FileServer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"a\.tar can't have"):
        remote(server, tmp_path).open("a.tar", size=size, sha256=hash_)


def test_cache_in_the_place_of_a_file_is_refused(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match=r"data\.cache\.dir"):
        remote(server, tmp_path, dir=str(tmp_path / "file"))


# A disk that fills


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"no disk of its own could be mounted: {mount.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_full_disk_makes_room_by_deleting_files_of_the_cache(
    small_disk: Path, server: FileServer, tmp_path: Path
) -> None:
    files = remote(server, tmp_path, dir=str(small_disk))
    for number in range(6):
        body = bytes([number]) + _BODY
        server.files[f"/data/{number}.tar"] = body
        assert read(files, f"{number}.tar", body) == body
    assert sha256(b"\5" + _BODY) in {path.name for path in small_disk.iterdir()}


def test_full_disk_without_files_to_delete_is_named(
    small_disk: Path, server: FileServer, tmp_path: Path
) -> None:
    (small_disk / "other").write_bytes(bytes(7 * 2**19))
    files = remote(server, tmp_path, dir=str(small_disk))
    said = rf"{small_disk} has no room for .*a\.tar: 1 MiB needed, 512 KiB free.*cache\.dir="
    with pytest.raises(UnavailableError, match=said):
        read(files)
    assert {path.name for path in small_disk.iterdir()} <= {"other", "lock"}
    (small_disk / "other").unlink()
    assert read(files) == _BODY


def test_disk_that_fills_while_a_file_is_written_makes_room_too(tmp_path: Path) -> None:
    """As on file systems that promise space and then don't have it."""
    cache = FileCache(tmp_path / "cache", max_bytes=10_000)
    old, new = _bodies(2)
    _get(cache, old)

    def write(file: BinaryIO) -> None:
        file.write(new)
        if (tmp_path / "cache" / sha256(old)).exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    with cache.open(sha256(new), size=1000, name="x", write=write) as file:
        assert file.read() == new
