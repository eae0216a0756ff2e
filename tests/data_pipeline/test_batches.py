"""Global batches depend on seed and sample index alone, and cover each token of an epoch once."""

import numpy as np
import pytest

from data_pipeline import Batch, DataError, GlobalBatches, ShardFolder, ValidationBatches

SEQ_LEN = 32


def whole_stream(folder: ShardFolder, split: str) -> np.ndarray:
    stream = folder.stream(split)
    tokens = np.empty(stream.num_tokens + 1, dtype=np.int64)
    stream.read(0, tokens)
    return tokens


def joined(batches: list[Batch]) -> Batch:
    return Batch(
        tokens=np.concatenate([batch.tokens for batch in batches]),
        targets=np.concatenate([batch.targets for batch in batches]),
        loss_mask=np.concatenate([batch.loss_mask for batch in batches]),
    )


def assert_equal(one: Batch, other: Batch) -> None:
    assert np.array_equal(one.tokens, other.tokens)
    assert np.array_equal(one.targets, other.targets)
    assert np.array_equal(one.loss_mask, other.loss_mask)


def train_batches(folder: ShardFolder, **settings: int) -> GlobalBatches:
    chosen = {"seq_len": SEQ_LEN, "global_batch_size": 352, "seed": 5, **settings}
    return GlobalBatches(folder, split="train", **chosen)


def test_any_number_of_ranks_reads_the_same_global_batch(folder: ShardFolder) -> None:
    first_samples = (0, 352, 5 * 352, 10**12)
    reference = train_batches(folder)
    for num_ranks in (1, 2, 22, 22 * 8):
        # Each rank has a reader of its own, as in a process of its own.
        readers = [train_batches(folder) for _ in range(num_ranks)]
        for first_sample in first_samples:
            slices = [
                reader.read(first_sample, rank=rank, num_ranks=num_ranks)
                for rank, reader in enumerate(readers)
            ]
            whole = reference.read(first_sample, rank=0, num_ranks=1)
            assert all(part.tokens.shape == (352 // num_ranks, SEQ_LEN) for part in slices)
            assert_equal(joined(slices), whole)


def test_batch_size_does_not_move_samples(folder: ShardFolder) -> None:
    large = train_batches(folder, global_batch_size=64)
    small = train_batches(folder, global_batch_size=8)
    pieces = [small.read(first, rank=0, num_ranks=1) for first in range(192, 256, 8)]
    assert_equal(joined(pieces), large.read(192, rank=0, num_ranks=1))


def test_an_epoch_trains_on_each_token_once(folder: ShardFolder) -> None:
    batches = train_batches(folder, global_batch_size=1)
    stream = whole_stream(folder, "train")
    assert (len(stream) - 1) % SEQ_LEN, "the tail is part of what is tested"
    for epoch in (0, 1):
        found: list[tuple[int, ...]] = []
        for index in range(epoch * batches.num_samples, (epoch + 1) * batches.num_samples):
            batch = batches.read(index, rank=0, num_ranks=1)
            mask = batch.loss_mask[0]
            num_valid = int(mask.sum())
            assert mask[:num_valid].all(), "padding stands at the end"
            found.append(
                (*batch.tokens[0, :num_valid].tolist(), int(batch.targets[0, num_valid - 1]))
            )
        expected = [
            tuple(stream[start : start + SEQ_LEN + 1].tolist())
            for start in range(0, len(stream) - 1, SEQ_LEN)
        ]
        assert sorted(found) == sorted(expected)
        assert found != expected
    assert batches.num_samples == len(expected)


def test_targets_are_the_tokens_after(folder: ShardFolder) -> None:
    batch = train_batches(folder).read(0, rank=0, num_ranks=1)
    assert batch.tokens.dtype == batch.targets.dtype == np.int64
    assert batch.loss_mask.dtype == np.bool_
    assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.tokens.flags.c_contiguous
    assert batch.targets.flags.c_contiguous


def test_seeds_have_other_orders(folder: ShardFolder) -> None:
    one = train_batches(folder).read(0, rank=0, num_ranks=1)
    other = train_batches(folder, seed=6).read(0, rank=0, num_ranks=1)
    assert not np.array_equal(one.tokens, other.tokens)


def test_ranks_that_do_not_divide_the_batch_are_refused(folder: ShardFolder) -> None:
    with pytest.raises(ValueError, match="352 sequences doesn't divide by 3"):
        train_batches(folder).read(0, rank=0, num_ranks=3)
    with pytest.raises(ValueError, match="rank=2"):
        train_batches(folder).read(0, rank=2, num_ranks=2)


def test_split_shorter_than_a_sequence_is_refused(folder: ShardFolder) -> None:
    with pytest.raises(DataError, match="fewer than one sequence of seq_len=1000000"):
        train_batches(folder, seq_len=10**6)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("seq_len", [1, 32, 57, 10**5])
def test_validation_counts_each_token_once(
    folder: ShardFolder, num_ranks: int, seq_len: int
) -> None:
    batches = ValidationBatches(folder, source="corpus", seq_len=seq_len, batch_size=8)
    stream = whole_stream(folder, "validation")
    tokens, targets = [], []
    for number in range(batches.num_batches):
        for rank in range(num_ranks):
            batch = batches.read(number, rank=rank, num_ranks=num_ranks)
            assert batch.tokens.shape == (8 // num_ranks, seq_len)
            tokens.append(batch.tokens[batch.loss_mask])
            targets.append(batch.targets[batch.loss_mask])
            assert (batch.targets[~batch.loss_mask] == 256).all()
    assert np.array_equal(np.concatenate(tokens), stream[:-1])
    assert np.array_equal(np.concatenate(targets), stream[1:])


def test_validation_stops_at_max_sequences(folder: ShardFolder) -> None:
    batches = ValidationBatches(
        folder, source="corpus", seq_len=SEQ_LEN, batch_size=8, max_sequences=11
    )
    assert batches.num_batches == 2
    last = batches.read(1, rank=1, num_ranks=2)
    assert not last.loss_mask.any()
    first = batches.read(1, rank=0, num_ranks=2)
    assert first.loss_mask.sum() == 3 * SEQ_LEN
