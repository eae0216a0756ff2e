"""Text tokenised while training: the same batches by any ranks, workers and restarts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import (
    Batch,
    BuildSettings,
    DataError,
    DataSettings,
    GlobalBatches,
    OnCorrupt,
    Packing,
    Prefetcher,
    ShardFolder,
    ValidationBatches,
    build_shards,
)
from data_pipeline.settings import SourceSettings
from tests.data_pipeline.conftest import build, write_corpus

BATCH = 12
SEQ_LEN = 64


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    build(tmp_path / "corpus", tmp_path / "text", tokenizer="none")
    return tmp_path / "text"


def batches_of(
    text: Path, *, tokenizer: str = "bytes", num_workers: int = 0, **more: Any
) -> GlobalBatches:
    return GlobalBatches(
        ShardFolder.open(text, tokenizer=tokenizer),
        seq_len=SEQ_LEN,
        global_batch_size=BATCH,
        seed=3,
        data=DataSettings(num_workers=num_workers),
        **more,
    )


def joined(parts: list[Batch]) -> tuple[np.ndarray, ...]:
    names = ("tokens", "targets", "loss_mask", "document_starts", "sources")
    return tuple(np.concatenate([getattr(part, name) for part in parts]) for name in names)


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    for ours, theirs in zip(joined(a), joined(b), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def whole(batches: GlobalBatches, step: int) -> Batch:
    return batches.read(step * BATCH, rank=0, num_ranks=1)


@pytest.mark.parametrize("tokenizer", ["bytes", "mixtral-v1"])
def test_an_epoch_has_each_document_once_whole(tmp_path: Path, text: Path, tokenizer: str) -> None:
    tokens = build(tmp_path / "corpus", tmp_path / "tokens", tokenizer=tokenizer)
    documents = tokens.documents("train", source="corpus")
    expected = sorted(documents.tokens(n).tolist() for n in range(documents.num_documents))
    batches = batches_of(text, tokenizer=tokenizer)
    num_steps = -(-2 * documents.num_tokens // (BATCH * SEQ_LEN))
    read = [whole(batches, step) for step in range(num_steps)]
    targets = np.concatenate([batch.targets.reshape(-1) for batch in read])
    for epoch in range(2):
        stream = targets[epoch * documents.num_tokens : (epoch + 1) * documents.num_tokens]
        ends = np.flatnonzero(stream == tokens.tokenizer.end_of_document) + 1
        found = [part.tolist() for part in np.split(stream, ends)[:-1]]
        if epoch == 0:
            assert sorted(found) == expected
            first = found
        else:
            assert sorted(found) == expected
            assert found != first, "another epoch, another order"
    for batch in read:
        before = np.roll(batch.targets, 1, axis=1)
        before[:, 0] = batch.tokens[:, 0]
        np.testing.assert_array_equal(batch.tokens, before)
        starts = batch.tokens == tokens.tokenizer.end_of_document
        starts[:, 0] = True
        np.testing.assert_array_equal(batch.document_starts, starts)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_ranks_and_workers_change_nothing(text: Path, num_workers: int) -> None:
    reference = batches_of(text, tokenizer="mixtral-v1")
    by_worker = batches_of(text, tokenizer="mixtral-v1", num_workers=num_workers)
    readers = [
        Prefetcher(
            by_worker if rank == 0 else batches_of(text, tokenizer="mixtral-v1"),
            first_sample=0,
            rank=rank,
            num_ranks=3,
            num_workers=num_workers,
            prefetch_batches=2,
        )
        for rank in range(3)
    ]
    try:
        for step in range(6):
            parts = [reader.read(step * BATCH) for reader in readers]
            assert_equal(parts, [whole(reference, step)])
    finally:
        for reader in readers:
            reader.close()
        by_worker.close()


def test_a_restart_goes_on_from_three_integers_a_source(text: Path) -> None:
    undisturbed = batches_of(text)
    expected = [whole(undisturbed, step) for step in range(60)]  # several epochs
    stopped = batches_of(text)
    for step in range(40):
        whole(stopped, step)
    position = stopped.position(30 * BATCH)  # some were read ahead
    assert set(position["places"]["corpus"]) == {"sequence", "document", "offset"}
    resumed = batches_of(text, position=position)
    assert_equal([whole(resumed, step) for step in range(30, 60)], expected[30:])
    assert resumed.position(60 * BATCH) == {
        **undisturbed.position(60 * BATCH),
    }
    with pytest.raises(ValueError, match="is before 360"):
        whole(resumed, 3)


def test_reading_in_any_order_finds_the_same(text: Path) -> None:
    reference, jumping = batches_of(text), batches_of(text)
    expected = [whole(reference, step) for step in range(12)]
    for step in (7, 2, 11, 0, 7, 8):
        assert_equal([whole(jumping, step)], [expected[step]])


def test_several_sources_are_mixed_as_tokens_are(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        write_corpus(tmp_path / name, seed=number)
    sources = {name: SourceSettings(corpus=str(tmp_path / name)) for name in ("one", "two")}
    settings = BuildSettings(to=str(tmp_path / "text"), tokenizer="none", sources=sources)
    build_shards(settings, progress=False)
    folder = ShardFolder.open(tmp_path / "text", tokenizer="bytes")
    data = DataSettings(weights={"one": 3.0, "two": 1.0})
    batches = GlobalBatches(folder, seq_len=SEQ_LEN, global_batch_size=BATCH, seed=0, data=data)
    read = [whole(batches, step) for step in range(4)]
    assert [int((batch.sources == 1).sum()) for batch in read] == [3] * 4
    assert batches.drawn(4 * BATCH) == {"one": 36, "two": 12}
    for step in (2, 0, 3, 1):  # by four ranks, in any order
        parts = [batches.read(step * BATCH, rank=rank, num_ranks=4) for rank in range(4)]
        assert_equal(parts, [read[step]])


def test_validation_text_is_tokenised_whole(tmp_path: Path, text: Path) -> None:
    tokens = build(tmp_path / "corpus", tmp_path / "tokens", tokenizer="mixtral-v1")
    folder = ShardFolder.open(text, tokenizer="mixtral-v1")
    ours, theirs = (
        ValidationBatches(of, source="corpus", seq_len=SEQ_LEN, batch_size=4)
        for of in (folder, tokens)
    )
    assert ours.num_batches == theirs.num_batches
    for number in range(ours.num_batches):
        assert_equal(
            [ours.read(number, rank=0, num_ranks=1)], [theirs.read(number, rank=0, num_ranks=1)]
        )
    assert ours.bytes_per_token == theirs.bytes_per_token


def test_validation_text_is_tokenised_as_far_as_needed(text: Path) -> None:
    """Documents of the seed's order, of which the last is cut; their bytes are counted."""
    folder = ShardFolder.open(text, tokenizer="mixtral-v1")
    tokenizer, first_words = folder.load_tokenizer(), set()
    for seed in (0, 0, 1, 2):
        batches = ValidationBatches(
            folder, source="corpus", seq_len=SEQ_LEN, batch_size=4, max_sequences=3, seed=seed
        )
        batch = batches.read(0, rank=0, num_ranks=1)
        assert (batches.num_batches, batches.bytes_per_token) == (1, None)
        targets = batch.targets[batch.loss_mask]
        assert len(targets) == 3 * SEQ_LEN
        found = batches.num_bytes(0, rank=0, num_ranks=1)
        assert abs(found - len(tokenizer.decode(targets).encode())) < 8  # a space, a cut character
        first_words.add(tokenizer.decode(targets[:8]))
    assert len(first_words) == 3


def test_a_damaged_document_is_refused(text: Path) -> None:
    folder = ShardFolder.open(text, tokenizer="bytes")
    shard = folder.source("corpus").splits["train"].shards[0]
    offset, length, _ = np.load(text / shard.documents)[1].tolist()
    content = bytearray((text / shard.file).read_bytes())
    content[offset + length // 2] ^= 4
    (text / shard.file).write_bytes(content)
    last_step = folder.num_bytes("train") // (BATCH * SEQ_LEN) + 2
    with pytest.raises(DataError, match=r"isn't what was written"):
        whole(batches_of(text), last_step)  # on the way there all documents are read


def test_a_source_that_was_left_out_for_a_while_goes_on_where_it_was(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        write_corpus(tmp_path / name, seed=number)
    build({name: tmp_path / name for name in ("one", "two")}, tmp_path / "text", tokenizer="none")

    def mixed(weights: Mapping[str, float], position: dict[str, Any] | None) -> GlobalBatches:
        return GlobalBatches(
            ShardFolder.open(tmp_path / "text", tokenizer="bytes"),
            seq_len=SEQ_LEN,
            global_batch_size=BATCH,
            seed=0,
            data=DataSettings(weights=dict(weights)),
            position=position,
        )

    both, one = {"one": 1.0, "two": 1.0}, {"one": 1.0}
    undisturbed = mixed(both, None)
    of_two = [
        batch.targets[batch.sources == 1] for batch in (whole(undisturbed, s) for s in (0, 1))
    ]
    begun = mixed(both, None)
    whole(begun, 0)
    between = mixed(one, begun.position(BATCH))
    whole(between, 1)
    again = mixed(both, between.position(2 * BATCH))
    batch = whole(again, 2)
    np.testing.assert_array_equal(batch.targets[batch.sources == 1], of_two[1])


def test_what_needs_counted_tokens_is_refused(text: Path) -> None:
    folder = ShardFolder.open(text, tokenizer="bytes")
    refused = (
        DataSettings(packing=Packing.best_fit),
        DataSettings(max_epochs=2.0),
        DataSettings(on_corrupt=OnCorrupt.skip),
    )
    for settings in refused:
        with pytest.raises(DataError, match=r"holds text.*build shards with a tokenizer"):
            GlobalBatches(folder, seq_len=8, global_batch_size=1, seed=0, data=settings)
    with pytest.raises(DataError, match=r"by data\.tokenizer"):
        assert ShardFolder.open(text).tokenizer
