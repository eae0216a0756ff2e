"""Global batches depend only on seed, settings and sample index; nothing is lost or repeated."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import (
    Batch,
    DataError,
    DataSettings,
    GlobalBatches,
    Packing,
    ShardFolder,
    ValidationBatches,
)
from data_pipeline.settings import StageSettings
from tests.data_pipeline.numbered import END, write_numbered
from tests.support.ranks import run_ranks

SEQ_LEN = 32
LENGTHS = {
    name: np.random.default_rng(seed).geometric(1 / mean, number).tolist()
    for seed, (name, mean, number) in enumerate([("en", 20, 70), ("fr", 60, 15), ("de", 9, 40)])
}
MIXED: dict[str, Any] = {
    "weights": {"en": 0.5, "fr": 0.3, "de": 0.2},
    "stages": [StageSettings(from_step=2, weights={"en": 0.1, "de": 0.9})],
}


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    return write_numbered(tmp_path_factory.mktemp("numbered") / "shards", LENGTHS)


def train_batches(
    folder: ShardFolder,
    *,
    seq_len: int = SEQ_LEN,
    size: int = 352,
    seed: int = 5,
    position: dict[str, Any] | None = None,
    **data: Any,
) -> GlobalBatches:
    return GlobalBatches(
        folder,
        seq_len=seq_len,
        global_batch_size=size,
        seed=seed,
        data=DataSettings(**data),
        position=position,
    )


def joined(batches: Sequence[Batch]) -> Batch:
    return Batch(
        tokens=np.concatenate([batch.tokens for batch in batches]),
        targets=np.concatenate([batch.targets for batch in batches]),
        loss_mask=np.concatenate([batch.loss_mask for batch in batches]),
        document_starts=np.concatenate([batch.document_starts for batch in batches]),
        sources=np.concatenate([batch.sources for batch in batches]),
        num_corrupt=sum(batch.num_corrupt for batch in batches),
    )


def assert_equal(one: Batch, other: Batch) -> None:
    for name, array in vars(one).items():
        assert np.array_equal(array, getattr(other, name)), name


def assert_well_formed(batch: Batch) -> None:
    """Every input is the token before its target, and all that isn't text is padding."""
    mask, starts = batch.loss_mask, batch.document_starts
    for array in (batch.tokens, batch.targets):
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
    assert mask.dtype == starts.dtype == np.bool_
    assert starts[:, 0].all()
    assert (batch.targets[~mask] == END).all()
    assert (batch.tokens[~mask] == END).all()
    assert (mask[:, 1:] <= mask[:, :-1]).all(), "padding stands at the end"
    begins_padding = mask[:, :-1] & ~mask[:, 1:]
    assert starts[:, 1:][begins_padding].all()
    assert not starts[:, 1:][~mask[:, 1:] & ~begins_padding].any()
    inside = mask[:, 1:] & ~starts[:, 1:]
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1])[inside].all()
    # Ids rise by one inside a document, so the one before a target is known.
    first = mask & (batch.tokens == END)
    assert starts[first].all(), "a first token is where a document starts"
    numbered = mask & ~first & (batch.targets != END)
    assert (batch.targets[numbered] == batch.tokens[numbered] + 1).all()


def counted(batches: Sequence[Batch], lengths: Sequence[int], first: int = 1) -> Counter[Any]:
    """How often each target came, less what all documents of the lengths have once.

    And how often a document's first token was predicted from the end of another, less once each.
    """
    found: Counter[Any] = Counter(
        np.concatenate([batch.targets[batch.loss_mask] for batch in batches]).tolist()
    )
    found.subtract(range(first, first + sum(lengths) - len(lengths)))
    found.subtract({END: len(lengths)})
    found["first"] = sum(int((b.tokens[b.loss_mask] == END).sum()) for b in batches) - len(lengths)
    return Counter({token: number for token, number in found.items() if number})


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("seq_len", [1, 7, SEQ_LEN, 500])
@pytest.mark.parametrize("window", [None, 2])
def test_an_epoch_trains_on_each_token_once(
    numbered: ShardFolder, packing: Packing, seq_len: int, window: int | None
) -> None:
    settings: dict[str, Any] = {
        "seq_len": seq_len,
        "packing": packing,
        "weights": {"en": 1.0},
        "shuffle_window": window,
    }
    number = train_batches(numbered, **settings).num_sequences["en"]
    batches = train_batches(numbered, size=number, **settings)
    epochs = [batches.read(first, rank=0, num_ranks=1) for first in (0, number)]
    for epoch in epochs:
        assert not counted([epoch], LENGTHS["en"])
        assert_well_formed(epoch)
        assert not epoch.sources.any()
    if number > 3:
        assert not np.array_equal(epochs[0].targets, epochs[1].targets)


@pytest.mark.parametrize("packing", list(Packing))
def test_each_source_of_a_mixture_goes_through_its_own_epochs(
    numbered: ShardFolder, packing: Packing
) -> None:
    batches = train_batches(numbered, size=8, packing=packing, **MIXED)
    whole = joined([batches.read(first, rank=0, num_ranks=1) for first in range(0, 1600, 8)])
    assert_well_formed(whole)
    drawn, first = batches.drawn(1600), 1
    for number, (name, lengths) in enumerate(LENGTHS.items()):
        rows = np.flatnonzero(whole.sources == number)
        assert len(rows) == drawn[name]
        each = batches.num_sequences[name]
        for epoch in range(len(rows) // each):
            of_epoch = [
                Batch(**{k: v[row : row + 1] for k, v in vars(whole).items() if k != "num_corrupt"})
                for row in rows[epoch * each : (epoch + 1) * each]
            ]
            assert not counted(of_epoch, lengths, first)
        first += sum(lengths) - len(lengths)
    assert len(rows) > 2 * each, "the last source is read more than once"


@pytest.mark.parametrize("packing", list(Packing))
def test_any_number_of_ranks_reads_the_same_global_batch(
    numbered: ShardFolder, packing: Packing
) -> None:
    settings = {"packing": packing, **MIXED}
    first_samples = (0, 352, 2 * 352, 10**12)
    reference = train_batches(numbered, **settings)
    for num_ranks in (1, 2, 22, 22 * 8):
        # Each rank has a reader of its own, as in a process of its own.
        readers = [train_batches(numbered, **settings) for _ in range(num_ranks)]
        for first_sample in first_samples:
            slices = [
                reader.read(first_sample, rank=rank, num_ranks=num_ranks)
                for rank, reader in enumerate(readers)
            ]
            whole = reference.read(first_sample, rank=0, num_ranks=1)
            assert all(part.tokens.shape == (352 // num_ranks, SEQ_LEN) for part in slices)
            assert_equal(joined(slices), whole)


def test_real_ranks_read_the_same_global_batch(numbered: ShardFolder) -> None:
    parts = run_ranks(_read_as_rank, 4, numbered.path)
    reference = train_batches(numbered, packing=Packing.best_fit, **MIXED)
    for step in range(3):
        whole = reference.read(step * 352, rank=0, num_ranks=1)
        assert_equal(joined([part[step] for part in parts]), whole)


def _read_as_rank(path: Path) -> list[Batch]:
    import torch.distributed as dist

    reader = train_batches(ShardFolder.open(path), packing=Packing.best_fit, **MIXED)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    return [reader.read(step * 352, rank=rank, num_ranks=num_ranks) for step in range(3)]


def test_batch_size_does_not_move_samples(numbered: ShardFolder) -> None:
    weights = MIXED["weights"]
    large = train_batches(numbered, size=64, weights=weights)
    small = train_batches(numbered, size=8, weights=weights)
    pieces = [small.read(first, rank=0, num_ranks=1) for first in range(192, 256, 8)]
    assert_equal(joined(pieces), large.read(192, rank=0, num_ranks=1))


def test_a_run_goes_on_as_if_it_had_not_stopped(numbered: ShardFolder) -> None:
    whole = train_batches(numbered, size=8, **MIXED)
    for step in (1, 2, 5):
        position = json.loads(json.dumps(whole.position(step * 8)))
        resumed = train_batches(numbered, size=8, position=position, **MIXED)
        for first in range(step * 8, step * 8 + 80, 8):
            assert_equal(
                resumed.read(first, rank=0, num_ranks=1), whole.read(first, rank=0, num_ranks=1)
            )


def test_new_weights_on_resume_repeat_no_token(numbered: ShardFolder) -> None:
    first = train_batches(numbered, size=4, weights={"en": 1.0, "fr": 1.0})
    second = train_batches(
        numbered, size=4, weights={"en": 2.0, "de": 1.0}, position=first.position(20)
    )
    batches = [first.read(sample, rank=0, num_ranks=1) for sample in range(0, 20, 4)]
    batches += [second.read(sample, rank=0, num_ranks=1) for sample in range(20, 40, 4)]
    targets = np.concatenate([batch.targets[batch.loss_mask] for batch in batches])
    numbers = targets[targets != END]
    assert len(np.unique(numbers)) == len(numbers)
    assert second.drawn(40)["fr"] == first.drawn(20)["fr"] == 10


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 6}, "seed=6 isn't the 5"),
        ({"seq_len": 16}, "train.seq_len=16 isn't the 32"),
        ({"packing": Packing.best_fit}, "data.packing=best_fit isn't the stream"),
        ({"shuffle_window": 3}, "data.shuffle_window=3 isn't the None"),
    ],
)
def test_a_position_of_another_order_is_refused(
    numbered: ShardFolder, changed: dict[str, Any], message: str
) -> None:
    position = train_batches(numbered).position(352)
    with pytest.raises(DataError, match=message):
        train_batches(numbered, position=position, **changed)


def test_seeds_have_other_orders(numbered: ShardFolder) -> None:
    one = train_batches(numbered).read(0, rank=0, num_ranks=1)
    other = train_batches(numbered, seed=6).read(0, rank=0, num_ranks=1)
    assert not np.array_equal(one.tokens, other.tokens)


def test_a_window_reads_from_few_shards_at_a_time(tmp_path: Path) -> None:
    # 40 shards of 8 sequences each.
    folder = write_numbered(tmp_path / "shards", {"en": [SEQ_LEN] * 320}, documents_per_shard=8)
    batches = train_batches(folder, size=32, shuffle_window=4)
    seen: list[set[int]] = []
    for step in range(10):
        batch = batches.read(step * 32, rank=0, num_ranks=1)
        seen.append(set(((batch.targets[:, 0] - 1) // (8 * (SEQ_LEN - 1))).tolist()))
    assert all(len(shards) == 4 for shards in seen)
    assert len(set.union(*seen)) == 40


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("seq_len", [2**15, 2**16])
def test_long_sequences(tmp_path: Path, seq_len: int, packing: Packing) -> None:
    lengths = [100_000, 5, 30_000, 200, 70_000, 1]
    folder = write_numbered(tmp_path / "shards", {"en": lengths}, documents_per_shard=2)
    batches = train_batches(folder, seq_len=seq_len, size=1, packing=packing)
    epoch = [
        batches.read(sample, rank=0, num_ranks=1) for sample in range(batches.num_sequences["en"])
    ]
    assert not counted(epoch, lengths)
    assert_well_formed(joined(epoch))
    assert epoch[0].tokens.shape == (1, seq_len)
    assert epoch[0].cu_seqlens[-1] == seq_len


def test_cu_seqlens_say_where_documents_begin(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "shards", {"en": [3, 4, 2]})
    batch = train_batches(folder, seq_len=6, size=2).read(0, rank=0, num_ranks=1)
    last = int(batch.loss_mask[0].all())  # the sequence that ends in padding
    places = [0, 3] if last else [0, 1, 3]
    others = [0, 1, 3] if last else [0, 3]
    assert batch.cu_seqlens.tolist() == [*places, *(6 + place for place in others), 12]
    assert batch.cu_seqlens.dtype == np.int32


def test_packing_is_reported_for_each_source(numbered: ShardFolder) -> None:
    report = train_batches(numbered, packing=Packing.best_fit, weights={"fr": 1.0}).report()
    assert list(report) == ["fr"]
    assert report["fr"].num_documents == 15
    assert report["fr"].num_cut_documents == sum(length > SEQ_LEN for length in LENGTHS["fr"])


def test_ranks_that_do_not_divide_the_batch_are_refused(numbered: ShardFolder) -> None:
    with pytest.raises(ValueError, match="352 sequences doesn't divide by 3"):
        train_batches(numbered).read(0, rank=0, num_ranks=3)
    with pytest.raises(ValueError, match="rank=2"):
        train_batches(numbered).read(0, rank=2, num_ranks=2)


def test_a_source_shorter_than_a_sequence_is_refused(numbered: ShardFolder) -> None:
    with pytest.raises(DataError, match=r"'en' in .*fewer than one sequence of seq_len=1000000"):
        train_batches(numbered, seq_len=10**6)


def test_a_source_that_runs_out_is_found_before_training(numbered: ShardFolder) -> None:
    settings: dict[str, Any] = {"size": 4, "weights": {"en": 0.5, "fr": 0.5}}
    train_batches(numbered, **settings).check_enough(10**9)  # nothing is forbidden
    limited = train_batches(numbered, max_epochs=1.5, **settings)
    allowed = int(1.5 * limited.num_sequences["fr"])
    limited.check_enough(2 * allowed)
    with pytest.raises(DataError, match=r"'fr' has .* over at step .*max_epochs=1.5") as error:
        limited.check_enough(2 * allowed + 2)
    over = next(n for n in range(10**4) if limited.drawn(n + 1)["fr"] > allowed)
    assert f"step {over // 4} (sample {over} of {2 * allowed + 2})" in str(error.value)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("seq_len", [1, 32, 57, 10**4])
def test_validation_counts_each_token_once(
    numbered: ShardFolder, num_ranks: int, seq_len: int
) -> None:
    batches = ValidationBatches(numbered, source="fr", seq_len=seq_len, batch_size=8)
    found = []
    for number in range(batches.num_batches):
        parts = [batches.read(number, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        for part in parts:
            assert part.tokens.shape == (8 // num_ranks, seq_len)
            assert_well_formed(part)
            assert (part.sources == 1).all()
        found += parts
    first = 1 + sum(LENGTHS["en"]) - len(LENGTHS["en"])
    assert not counted(found, LENGTHS["fr"], first)
    numbers = np.concatenate([batch.targets[batch.loss_mask] for batch in found])
    assert (np.diff(numbers[numbers != END]) == 1).all(), "in stored order"


def test_validation_stops_at_max_sequences(numbered: ShardFolder) -> None:
    batches = ValidationBatches(
        numbered, source="en", seq_len=SEQ_LEN, batch_size=8, max_sequences=11
    )
    assert batches.num_batches == 2
    last = batches.read(1, rank=1, num_ranks=2)
    assert not last.loss_mask.any()
    first = batches.read(1, rank=0, num_ranks=2)
    assert first.loss_mask.sum() == 3 * SEQ_LEN
