"""However many shards a folder has, a bounded number of them is open at a time."""

import mmap
import os
import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline import DataSettings, GlobalBatches, ShardFolder
from data_pipeline.shards.index import ShardEntry
from data_pipeline.shards.maps import ShardMaps
from tests.data_pipeline.conftest import in_child
from tests.data_pipeline.numbered import write_many, write_numbered


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def allow(soft: int, hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def require_in_child(work: Callable[[], None]) -> None:
    """Runs work in a process of its own, whose limits may be lowered permanently."""
    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 0


def read_each(folder: ShardFolder) -> NDArray[np.integer]:
    """Reads each document by itself, in random order; returns the tokens that each of them has."""
    documents = folder.documents("train", source="en")
    expected = documents.tokens(0)
    for number in np.random.default_rng(0).permutation(documents.num_documents).tolist():
        assert np.array_equal(documents.tokens(number), expected)
    return expected


def read_all(folder: ShardFolder) -> GlobalBatches:
    """Reads each document by itself, and then an epoch of large batches.

    Returns these, for they hold shards open.
    """
    expected = read_each(folder)
    size = folder.documents("train", source="en").num_documents // 4
    batches = GlobalBatches(folder, seq_len=16, global_batch_size=size, seed=0, data=DataSettings())
    for first in range(0, 4 * size, size):
        batch = batches.read(first, rank=0, num_ranks=1)
        assert (batch.targets == expected).all()
    return batches


def advised_for_random_reads(folder: Path) -> dict[str, bool]:
    """Of each shard that this process has mapped, whether the kernel knows that."""
    found, name = {}, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = Path(line.split(maxsplit=5)[5]) if len(line.split()) > 5 else Path()
            name = path.name if path.parent == folder else None
        elif name is not None and line.startswith("VmFlags:"):
            found[name] = "rr" in line.split()
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_map_is_advised_for_random_reads(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "shards", {"en": [100] * 30}, documents_per_shard=4)
    batches = GlobalBatches(folder, seq_len=64, global_batch_size=40, seed=0, data=DataSettings())
    batches.read(0, rank=0, num_ranks=1)
    found = advised_for_random_reads(folder.path)
    assert set(found) == {shard.file for shard in folder.source("en").splits["train"].shards}
    assert all(found.values())


def num_bytes_read() -> int:
    """From the disk, by this process."""
    (line,) = re.findall(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(line)


def uncache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cold_batch_reads_little_more_than_its_documents(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "shards", {"en": [600] * 1500}, documents_per_shard=1500)
    (shard,) = folder.source("en").splits["train"].shards
    path = folder.path / shard.file
    uncache(path)
    before = num_bytes_read()
    path.read_bytes()
    if num_bytes_read() - before < shard.size:
        pytest.skip("this file system keeps the file in memory, or doesn't count what is read")
    uncache(path)
    batches = GlobalBatches(folder, seq_len=600, global_batch_size=20, seed=0, data=DataSettings())
    before = num_bytes_read()
    batches.read(0, rank=0, num_ranks=1)
    # A document of 2,400 bytes lies in two pages, and a sequence in two documents at most.
    assert num_bytes_read() - before <= 20 * 2 * 2 * mmap.PAGESIZE
    assert shard.size > 20 * 20 * 2 * mmap.PAGESIZE


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "many", num_shards=500)

    def work() -> None:
        os.closerange(3, 4096)  # what the tests before have left open
        allow(128, 128)
        _batches = read_all(ShardFolder.open(folder.path))
        assert num_open() < 100

    require_in_child(work)


def test_the_soft_limit_is_raised_for_shards_and_for_nothing_else(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "many", num_shards=300)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def work() -> None:
        allow(1024, hard)
        ShardFolder.open(folder.path)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1024, hard)
        allow(256, hard)
        _batches = read_all(ShardFolder.open(folder.path))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
        assert num_open() > 300  # all stay open where they may

    require_in_child(work)


class Opened:
    """A folder of shards of one byte; says which were opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def open(self, name: str, *, size: int, sha256: str) -> BinaryIO:
        self.names.append(name)
        (self.folder / name).write_bytes(b"x")
        return (self.folder / name).open("rb")


def test_the_map_that_was_used_least_recently_is_released(tmp_path: Path) -> None:
    files: Any = Opened(tmp_path)
    maps = ShardMaps(files, most=2, at_once=1)

    def read(name: str) -> None:
        maps.bytes_of(
            ShardEntry(
                file=name, size=1, sha256="0" * 64, num_documents=1, num_tokens=1, num_bytes=1,
                documents="", documents_sha256="0" * 64,
            )
        )  # fmt: skip

    for name in ("a", "b", "a", "c", "a", "b"):
        read(name)
    assert files.names == ["a", "b", "c", "b"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 200,000 links are made, read and removed
def test_a_hundred_thousand_shards_with_any_number_of_open_files_allowed(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "many", num_shards=100_000)

    def work() -> None:
        with suppress(ValueError, OSError):  # root may, and meets the kernel's bound of 65,530 maps
            allow(300_000, 300_000)
        read_each(ShardFolder.open(folder.path))

    require_in_child(work)
