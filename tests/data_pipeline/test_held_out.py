"""What is validated on: sequences spread over a split, and the bytes of exactly their text."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline import OnCorrupt, ShardFolder, Tokenizer, ValidationBatches, tokenizer_named
from data_pipeline.reading.held_out import text_bytes
from tests.data_pipeline.conftest import build, write_corpus
from tests.data_pipeline.numbered import write_numbered

SEQ_LEN = 16
TEXT = "Ein Satz für é, ein 漢字 und 🙂🙂 – und  zwei Leerzeichen.\n\tEnde" * 3


@pytest.fixture(scope="module", params=["bytes", "bpe:400", "mixtral-v1"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    folder = tmp_path_factory.mktemp("shards")
    write_corpus(folder / "corpus", num_documents=40)
    for number in range(8):  # long ones, with characters of several tokens
        (folder / "corpus" / f"long-{number}.txt").write_text(f"{number} {TEXT}")
    return build(folder / "corpus", folder / "to", tokenizer=request.param, validation_fraction=0.5)


def held_out(folder: ShardFolder, limit: int | None, *, seed: int = 0) -> ValidationBatches:
    return ValidationBatches(
        folder,
        source=folder.sources[0],
        seq_len=SEQ_LEN,
        batch_size=4,
        max_sequences=limit,
        seed=seed,
    )


def first_tokens(
    folder: ShardFolder, limit: int | None, *, seed: int = 0, num_ranks: int = 1
) -> list[int]:
    """The first target of each sequence that is read, a number that tells where it stands."""
    batches = held_out(folder, limit, seed=seed)
    parts = [
        batches.read(number, rank=rank, num_ranks=num_ranks)
        for number in range(batches.num_batches)
        for rank in range(num_ranks)
    ]
    return [int(row[0]) for part in parts for row in part.targets[part.loss_mask.any(1)]]


def test_validation_sequences_are_spread_over_the_whole_split(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "numbered", {"en": [SEQ_LEN] * 200})
    everything = first_tokens(folder, None)
    for limit in (1, 7, 50, 199):
        found = first_tokens(folder, limit)
        places = np.searchsorted(everything, found)
        assert len(set(places.tolist())) == limit
        # The same distance from each to the next, but for rounding, and at both ends.
        steps = np.diff(np.concatenate([places, places[:1] + 200]))
        assert set(steps.tolist()) <= {200 // limit, -(-200 // limit)}
    assert first_tokens(folder, 500) == everything


def test_they_are_the_same_for_a_seed_whatever_the_layout(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "numbered", {"en": [SEQ_LEN] * 200})
    assert first_tokens(folder, 7, num_ranks=4) == first_tokens(folder, 7)
    assert len({tuple(first_tokens(folder, 7, seed=seed)) for seed in range(5)}) > 1


def test_bytes_are_those_of_the_text_that_is_read(shards: ShardFolder) -> None:
    """All sequences counted one by one have the bytes of the split; none is counted twice."""
    total = shards.num_bytes("validation")
    batches = held_out(shards, None)
    assert batches.bytes_per_token == total / shards.num_tokens("validation")
    for num_ranks in (1, 4):
        counted = sum(
            batches.num_bytes(number, rank=rank, num_ranks=num_ranks)
            for number in range(batches.num_batches)
            for rank in range(num_ranks)
        )
        assert counted == total


def test_bytes_of_a_part_are_counted_and_not_estimated(shards: ShardFolder) -> None:
    limit = 5
    batches = held_out(shards, limit)
    assert batches.bytes_per_token is None
    counted = sum(batches.num_bytes(n, rank=0, num_ranks=1) for n in range(batches.num_batches))
    tokenizer = shards.load_tokenizer()
    texts = [
        tokenizer.decode(row[mask]).encode()
        for n in range(batches.num_batches)
        for batch in (batches.read(n, rank=0, num_ranks=1),)
        for row, mask in zip(batch.targets, batch.loss_mask, strict=True)
    ]
    # Decoded alone, a sequence may miss the space that it begins with, and has a sign of three
    # bytes for each byte of a character that is cut.
    assert abs(counted - sum(map(len, texts))) <= 12 * limit


@pytest.mark.parametrize("name", ["bytes", "mixtral-v1", "mixtral-v3"])
def test_a_character_of_several_tokens_counts_with_its_last(name: str) -> None:
    tokenizer: Tokenizer = tokenizer_named(name)
    text = "a\N{GOTHIC LETTER AHSA}b"  # four bytes, which no vocabulary here has as one token
    tokens = tokenizer.encode(text)
    counted = [text_bytes(tokenizer, tokens, begin=n, end=n + 1) for n in range(len(tokens))]
    assert sum(counted) == 6
    assert [n for n in counted if n] == [1, 4, 1]


def test_a_corrupt_sequence_counts_no_bytes(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    folder = build(tmp_path / "corpus", tmp_path / "to", validation_fraction=0.5)
    shard = folder.source("corpus").splits["validation"].shards[0]
    begin, length, _ = np.load(folder.path / shard.documents)[3].tolist()
    content = bytearray((folder.path / shard.file).read_bytes())
    content[begin + length // 2] ^= 1
    (folder.path / shard.file).write_bytes(content)
    batches = ValidationBatches(
        ShardFolder.open(folder.path),
        source="corpus",
        seq_len=SEQ_LEN,
        batch_size=1000,
        max_sequences=100,
        on_corrupt=OnCorrupt.skip,
    )
    batch = batches.read(0, rank=0, num_ranks=1)
    assert batch.num_corrupt
    targets = batch.targets[batch.loss_mask]
    assert batches.num_bytes(0, rank=0, num_ranks=1) == (targets < 256).sum()
