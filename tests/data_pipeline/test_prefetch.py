"""Reading ahead changes nothing but when a batch is read."""

import threading
import time
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from data_pipeline import Batch, GlobalBatches, Packing, Prefetcher, ShardFolder
from tests.data_pipeline.numbered import write_numbered
from tests.data_pipeline.test_batches import LENGTHS, MIXED, assert_equal, joined, train_batches

NUM_RANKS = 22 * 8


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    return write_numbered(tmp_path_factory.mktemp("numbered") / "shards", LENGTHS)


def ahead(
    batches: GlobalBatches,
    *,
    first_sample: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    num_workers: int = 2,
    prefetch_batches: int = 3,
) -> Prefetcher:
    return Prefetcher(
        batches,
        first_sample=first_sample,
        rank=rank,
        num_ranks=num_ranks,
        num_workers=num_workers,
        prefetch_batches=prefetch_batches,
    )


@pytest.mark.parametrize("packing", list(Packing))
def test_22_nodes_of_8_ranks_with_4_workers_read_what_one_rank_reads(
    numbered: ShardFolder, packing: Packing
) -> None:
    reference = train_batches(numbered, packing=packing, **MIXED)
    num_epochs = reference.drawn(5 * 352)["de"] / reference.num_sequences["de"]
    assert num_epochs > 2, "the steps go over borders of epochs"
    ranks = [
        ahead(
            train_batches(numbered, packing=packing, **MIXED),
            rank=rank,
            num_ranks=NUM_RANKS,
            num_workers=4,
            prefetch_batches=4,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        for step in range(5):
            whole = reference.read(step * 352, rank=0, num_ranks=1)
            assert_equal(joined([reader.read(step * 352) for reader in ranks]), whole)
    finally:
        for reader in ranks:
            reader.close()


def test_a_restart_with_other_ranks_and_workers_goes_on(numbered: ShardFolder) -> None:
    reference = train_batches(numbered, **MIXED)
    for step, num_ranks, num_workers in ((1, 2, 0), (2, 11, 1), (3, 16, 3), (10**6, 4, 2)):
        position = reference.position(step * 352)
        ranks = [
            ahead(
                train_batches(numbered, position=position, **MIXED),
                first_sample=step * 352,
                rank=rank,
                num_ranks=num_ranks,
                num_workers=num_workers,
            )
            for rank in range(num_ranks)
        ]
        for sample in (step * 352, (step + 1) * 352):
            whole = reference.read(sample, rank=0, num_ranks=1)
            assert_equal(joined([reader.read(sample) for reader in ranks]), whole)
        for reader in ranks:
            reader.close()


def test_any_sample_can_be_sought(numbered: ShardFolder) -> None:
    batches = train_batches(numbered, size=4)
    for num_workers in (0, 1, 3):
        reader = ahead(batches, num_workers=num_workers)
        for sample in (0, 4, 8, 400, 404, 3, 3, 7, 10**12):
            assert_equal(reader.read(sample), batches.read(sample, rank=0, num_ranks=1))
        reader.close()


class Counted:
    """Batches that say how far was read, and fail at one sample."""

    global_batch_size = 4

    def __init__(self, failing: int | None = None) -> None:
        self.started: list[int] = []
        self.read_enough = threading.Event()
        self._failing = failing

    def read(self, first_sample: int, *, rank: int, num_ranks: int) -> Batch:
        self.started.append(first_sample)
        if len(self.started) >= 3:
            self.read_enough.set()
        if first_sample == self._failing:
            raise OSError(f"sample {first_sample}")
        number = np.full((1, 1), first_sample)
        true = np.ones((1, 1), dtype=np.bool_)
        return Batch(
            tokens=number, targets=number, loss_mask=true, document_starts=true, sources=number[0]
        )


def test_no_more_is_read_ahead_than_was_asked() -> None:
    batches = Counted()
    reader = ahead(cast(GlobalBatches, batches), num_workers=8, prefetch_batches=3)
    assert batches.read_enough.wait(10)
    time.sleep(0.1)  # for a fourth, if there were one
    assert sorted(batches.started) == [0, 4, 8]
    reader.close()


def test_an_error_comes_with_the_batch_that_it_belongs_to() -> None:
    reader = ahead(cast(GlobalBatches, Counted(failing=8)), num_workers=2)
    assert reader.read(0).tokens.item() == 0
    assert reader.read(4).tokens.item() == 4
    with pytest.raises(OSError, match="sample 8"):
        reader.read(8)
    assert reader.read(12).tokens.item() == 12
    reader.close()


def test_threads_end_with_the_reader(numbered: ShardFolder, tmp_path: Path) -> None:
    before = threading.active_count()
    reader = ahead(train_batches(numbered, size=4), num_workers=4, prefetch_batches=8)
    reader.read(0)
    assert threading.active_count() > before
    reader.close()
    assert threading.active_count() == before
