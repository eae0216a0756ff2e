"""Files that appear whole: their writers are killed, hindered and many."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.atomic_files import (
    name_folder,
    new_file,
    remove_leftovers,
    sync_tree,
    write_file,
)

WRITER = """
import os, signal, sys
from pathlib import Path
from data_pipeline import atomic_files
path, moment = Path(sys.argv[1]), sys.argv[2]

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if moment != "writing":
    setattr(os, moment, killed)
with atomic_files.new_file(path) as file:
    file.write(b"new" * 100_000)
    if moment == "writing":
        killed()
"""


@pytest.mark.parametrize("moment", ["writing", "fsync", "replace"])
def test_a_writer_killed_before_the_rename_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "state.json"
    write_file(path, "old")
    killed = subprocess.run([sys.executable, "-c", WRITER, str(path), moment])
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (leftover,) = (p for p in tmp_path.iterdir() if p != path)
    remove_leftovers(tmp_path)
    assert leftover.exists(), "its writer may still be there"
    os.utime(leftover, (time.time() - 100,) * 2)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["state.json"]


def test_an_error_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_file(path, "old")

    def fail() -> None:
        with new_file(path) as file:
            file.write(b"new")
            file.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.fixture
def files_of_a_kilobyte() -> Iterator[None]:
    """What is written past the limit is an error, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("files_of_a_kilobyte")
@pytest.mark.parametrize("durable", [False, True])
def test_a_disk_that_takes_no_more_is_told_and_leaves_the_old_file(
    tmp_path: Path, durable: bool
) -> None:
    path = tmp_path / "state.json"
    write_file(path, "old")
    with pytest.raises(OSError, match="File too large") as full:
        write_file(path, "new" * 1000, durable=durable)
    assert full.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The system calls that decide about a power cut, in order; they are made all the same."""
    made: list[str] = []

    def fsync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        made.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix or 'folder'}")
        real(descriptor)

    def replace(*paths: Path, real: Callable[..., None] = os.replace) -> None:
        made.append("rename")
        real(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", replace)
    return made


def test_bytes_are_on_the_disk_before_the_name_and_the_name_afterwards(
    tmp_path: Path, calls: list[str]
) -> None:
    write_file(tmp_path / "state.json", "durable")
    assert calls == ["fsync .new", "rename", "fsync folder"]
    calls.clear()
    write_file(tmp_path / "state.json", "for people", durable=False)
    assert calls == ["rename"]


def test_a_folder_is_on_the_disk_before_its_name_and_its_name_afterwards(
    tmp_path: Path, calls: list[str]
) -> None:
    (tmp_path / "unnamed" / "in").mkdir(parents=True)
    for name in ("a.txt", "in/b.bin"):
        (tmp_path / "unnamed" / name).write_text(name)
    sync_tree(tmp_path / "unnamed")
    assert calls == ["fsync .bin", "fsync folder", "fsync .txt", "fsync folder"]
    calls.clear()
    (tmp_path / "to").mkdir()
    name_folder(tmp_path / "unnamed", tmp_path / "to")
    assert calls == ["fsync folder", "rename", "fsync folder"]
    assert (tmp_path / "to" / "in" / "b.bin").read_text() == "in/b.bin"
    (tmp_path / "more").mkdir()
    with pytest.raises(OSError, match="not empty"):
        name_folder(tmp_path / "more", tmp_path / "to")


def test_permissions_are_those_of_the_file_before_or_of_any_new_one(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    before = os.umask(0o027)
    try:
        write_file(path, "new")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o600)
        write_file(path, "replaced")
        assert path.stat().st_mode & 0o777 == 0o600
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
        write_file(path, "in place of a link")
    finally:
        os.umask(before)
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_stays_where_it_is_not_to_be_replaced(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def link(*_: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    path = tmp_path / "claim"
    with new_file(path, replace=False) as file:
        file.write(b"first")

    def second() -> None:
        with new_file(path, replace=False) as file:
            file.write(b"second")

    with pytest.raises(FileExistsError):
        second()
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["claim"]


def test_of_many_writers_at_once_one_stays_whole_and_one_alone_creates(tmp_path: Path) -> None:
    texts = [str(number) * 100_000 for number in range(8)]
    created: list[str] = []

    def write(text: str) -> None:
        for _ in range(10):
            write_file(tmp_path / "written", text, durable=False)
            assert (tmp_path / "written").read_text() in texts
        try:
            with new_file(tmp_path / "created", replace=False) as file:
                file.write(text.encode())
        except FileExistsError:
            return
        created.append(text)

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    assert created == [(tmp_path / "created").read_text()]
    assert (tmp_path / "written").read_text() in texts
    assert sorted(os.listdir(tmp_path)) == ["created", "written"]
