"""Locks, with processes that wait, that die and that take the file away."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.locks import LockHeldError, locked, owned, owner_of

HOLDER = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
from data_pipeline.locks import locked, owned
name, path = sys.argv[1:]
with {"locked": locked, "owned": owned}[name](Path(path)):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path: Path, *, by: str = "owned") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, by, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_process_is_refused_with_the_id_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with holder(path) as process:
        with pytest.raises(LockHeldError, match=f"process {process.pid} holds the lock") as refused:
            owned(path).__enter__()
        assert refused.value.owner == owner_of(path) == str(process.pid)


def test_a_killed_holder_frees_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert owner_of(path) is None, "its id still stands in the file"
        with owned(path):
            assert owner_of(path) == str(os.getpid())


def test_a_second_process_waits_until_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    said: list[str] = []
    with holder(path, by="locked") as process:

        def wait() -> None:
            with locked(path, waiting=lambda: said.append("waiting")):
                said.append("has it")

        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: said)
        time.sleep(0.1)
        assert said == ["waiting"]
        os.kill(process.pid, signal.SIGKILL)
        thread.join(timeout=60)
    assert said == ["waiting", "has it"]


def test_threads_exclude_each_other_too(tmp_path: Path) -> None:
    with owned(tmp_path / "lock"), pytest.raises(LockHeldError):
        owned(tmp_path / "lock").__enter__()


@pytest.mark.parametrize(
    "take_away", [Path.unlink, lambda path: path.rename(path.with_name("renamed"))]
)
def test_who_waited_for_a_file_that_is_gone_locks_the_one_that_has_its_name(
    tmp_path: Path, take_away: Callable[[Path], Any]
) -> None:
    path = tmp_path / "folder" / "lock"
    order: list[str] = []
    waits = threading.Event()

    def second() -> None:
        with locked(path, waiting=waits.set) as file:
            order.append("second")
            assert os.path.samestat(os.fstat(file.fileno()), path.stat())

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(60)
        take_away(path)
        with locked(path, wait=False):  # another file, and so another lock
            order.append("another")
            path.parent.joinpath("free").touch()
        order.append("first")
    thread.join(timeout=60)
    assert order == ["another", "first", "second"]


def test_a_lock_is_made_again_where_its_folder_is_removed_with_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    waits, has = threading.Event(), threading.Event()

    def second() -> None:
        with locked(path, waiting=waits.set):
            has.set()

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(60)
        path.unlink()
        path.parent.rmdir()
    assert has.wait(60)
    thread.join(timeout=60)
    assert path.exists()


def test_leaving_frees_a_lock_that_a_forked_child_has_the_file_of(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        with locked(tmp_path / "lock", wait=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_who_only_looks_makes_no_file_and_keeps_nobody_out(tmp_path: Path) -> None:
    assert owner_of(tmp_path / "lock") is None
    assert owner_of(tmp_path / "lock" / "lock") is None
    with pytest.raises(FileNotFoundError), locked(tmp_path / "lock", create=False):
        pass
    assert not list(tmp_path.iterdir())
    with owned(tmp_path / "lock"):
        pass
    assert owner_of(tmp_path / "lock") is None


def test_content_stays_and_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"content")

    def fail() -> None:
        with locked(path, create=False) as file:
            assert file.read() == b"content"
            raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_an_error_unless_they_are_optional(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "lock"
    with pytest.raises(OSError, match=os.strerror(number)):
        locked(path).__enter__()
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            locked(path, optional=True).__enter__()
    else:
        with locked(path, optional=True):
            assert path.exists()
