"""The index of the documents is in files that all processes of a machine map, and nobody holds."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import DataSettings, GlobalBatches, ShardFolder
from data_pipeline.settings import CacheSettings, OnCorrupt, Packing
from data_pipeline.shards import documents as documents_module
from data_pipeline.shards import node_arrays
from data_pipeline.shards.node_arrays import NodeArrays
from tests.data_pipeline.conftest import in_child
from tests.data_pipeline.numbered import write_numbered


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the arrays of small folders in files, too."""
    monkeypatch.setattr(NodeArrays.__init__, "__kwdefaults__", {"least_length": 1})


def open_folder(path: Path) -> ShardFolder:
    return ShardFolder.open(path, cache=CacheSettings(dir=str(path.parent / "cache")))


def batches_of(folder: ShardFolder, packing: Packing) -> GlobalBatches:
    return GlobalBatches(
        folder, seq_len=48, global_batch_size=8, seed=3, data=DataSettings(packing=packing)
    )


def read_some(batches: GlobalBatches) -> list[np.ndarray]:
    read = [batches.read(first, rank=0, num_ranks=1) for first in range(0, 160, 8)]
    return [array for batch in read for array in (batch.tokens, batch.targets, batch.loss_mask)]


def write(tmp_path: Path) -> Path:
    lengths = np.random.default_rng(0).integers(2, 130, size=200).tolist()
    return write_numbered(tmp_path / "shards", {"en": lengths, "de": lengths[::-1]}).path


@pytest.mark.parametrize("packing", list(Packing))
def test_batches_are_the_same_from_files_and_from_memory(
    tmp_path: Path, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    in_memory = batches_of(open_folder(path), packing)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(NodeArrays.__init__, "__kwdefaults__", {"least_length": 1})
    for _ in range(2):  # written, then found
        mapped = batches_of(open_folder(path), packing)
        assert mapped.report() == in_memory.report()
        assert mapped.num_sequences == in_memory.num_sequences
        for ours, theirs in zip(read_some(mapped), read_some(in_memory), strict=True):
            assert np.array_equal(ours, theirs)


@pytest.mark.usefixtures("in_files")
@pytest.mark.parametrize("packing", list(Packing))
def test_second_process_reads_no_table_and_maps_the_same_files(
    tmp_path: Path, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    batches_of(open_folder(path), packing)

    def refused(*given: Any, **named: Any) -> None:
        raise AssertionError("a table is read")

    monkeypatch.setattr(documents_module, "_table", refused)
    batches = batches_of(open_folder(path), packing)
    read_some(batches)
    mapped = set(re.findall(r"/cache/index/\w+/(\w+)\.npy", Path("/proc/self/maps").read_text()))
    expected = {"starts", "begins", "crcs"}
    if packing is Packing.best_fit:
        expected |= {"documents", "offsets", "firsts"}
    assert mapped == expected


@pytest.mark.usefixtures("in_files")
def test_of_several_processes_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    write_once = node_arrays._write

    def counted(folder: Path, *given: Any) -> None:
        with (tmp_path / "writers").open("a") as file:
            file.write(f"{os.getpid()} {folder.name}\n")
        write_once(folder, *given)

    monkeypatch.setattr(node_arrays, "_write", counted)
    children = [
        in_child(lambda: read_some(batches_of(open_folder(path), Packing.stream))) for _ in range(4)
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    written = [line.split()[1] for line in (tmp_path / "writers").read_text().splitlines()]
    assert len(written) == len(set(written)) == 2  # sources


@pytest.mark.usefixtures("in_files")
def test_writer_that_is_killed_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)

    def killed() -> None:
        node_arrays.sync_tree = lambda folder: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[attr-defined]  # not exported
        batches_of(open_folder(path), Packing.stream)

    assert os.waitpid(in_child(killed), 0)[1] == signal.SIGKILL
    index = tmp_path / "cache" / "index"
    assert [name for name in os.listdir(index) if name.endswith(".new")]
    read_some(batches_of(open_folder(path), Packing.stream))
    assert not [name for name in os.listdir(index) if name.endswith(".new")]


@pytest.mark.usefixtures("in_files")
def test_other_shards_have_other_files(tmp_path: Path) -> None:
    path = write(tmp_path)
    read_some(batches_of(open_folder(path), Packing.stream))
    shutil.rmtree(path)
    write_numbered(path, {"en": [100] * 50, "de": [90] * 50})
    batches = batches_of(open_folder(path), Packing.stream)
    assert batches.num_sequences == {"en": -(-100 * 50 // 48), "de": -(-90 * 50 // 48)}


@pytest.mark.usefixtures("in_files")
def test_cache_that_cannot_be_written_costs_memory_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path)
    (tmp_path / "cache").write_text("a file")
    read_some(batches_of(open_folder(path), Packing.stream))
    assert "holds the index of the documents in its own memory" in caplog.text


def test_a_process_holds_a_bit_for_each_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NodeArrays.__init__, "__kwdefaults__", {"least_length": 1})
    path = write(tmp_path)
    documents = open_folder(path).documents("train", source="en")
    held = [value for value in vars(documents).values() if isinstance(value, np.ndarray)]
    owned = [array.nbytes for array in held if not is_mapped(array)]
    assert sum(owned) == -(-documents.num_documents // 8) + 8 * (documents.num_shards + 1)


def is_mapped(array: np.ndarray) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


@pytest.mark.usefixtures("in_files")
def test_each_document_is_checked_once_and_a_lost_shard_never(tmp_path: Path) -> None:
    path = write(tmp_path)
    shard = open_folder(path).source("en").splits["train"].shards[1]
    os.truncate(path / shard.file, 512)
    cache = CacheSettings(dir=str(tmp_path / "cache"))
    folder = ShardFolder.open(path, on_corrupt=OnCorrupt.skip, cache=cache)
    documents = folder.documents("train", source="en", on_corrupt=OnCorrupt.skip)
    checked: list[int] = []
    check = documents._check

    def counted(documents: np.ndarray) -> None:
        checked.extend(documents.tolist())
        check(documents)

    documents._check = counted
    numbers = np.arange(documents.num_documents)
    for _ in range(2):
        whole = documents.whole(numbers)
        assert np.flatnonzero(~whole).tolist() == list(range(10, 20))
    assert checked == [number for number in numbers if not 10 <= number < 20]
