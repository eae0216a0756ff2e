"""A shard folder that isn't what its index says is refused with the file's name, or skipped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from data_pipeline import Batch, DataError, DataSettings, GlobalBatches, OnCorrupt, ShardFolder
from data_pipeline.storage import LocalFiles
from tests.data_pipeline.conftest import damaged
from tests.data_pipeline.numbered import END, write_numbered


def first_shard(folder: ShardFolder) -> Path:
    return folder.path / folder.source("corpus").splits["train"].shards[0].file


def change_index(folder: ShardFolder, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder.path / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def shard_of(index: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = index["sources"][0]["splits"]["train"]["shards"][0]
    return shard


def test_truncated_shard_is_named_with_its_sizes(folder: ShardFolder) -> None:
    shard = first_shard(folder)
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 700)
    with pytest.raises(DataError, match=rf"{shard.name} has {size - 700} bytes.*have {size}"):
        ShardFolder.open(folder.path)


def test_missing_shard_is_named(folder: ShardFolder) -> None:
    shard = first_shard(folder)
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name} is missing"):
        ShardFolder.open(folder.path)


def test_flipped_byte_is_found_by_verify(folder: ShardFolder) -> None:
    shard = first_shard(folder)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert list(damaged(ShardFolder.open(folder.path))) == [shard.name]


def test_changed_table_of_documents_is_found_when_reading(folder: ShardFolder) -> None:
    table = folder.path / folder.source("corpus").splits["train"].shards[0].documents
    documents = np.load(table)
    documents[0, 1] += 1
    np.save(table, documents)
    with pytest.raises(DataError, match=table.name):
        ShardFolder.open(folder.path).documents("train", source="corpus")


def test_index_that_lies_about_tokens_is_found(folder: ShardFolder) -> None:
    def lie(index: dict[str, Any]) -> None:
        shard_of(index)["num_tokens"] -= 7
        index["sources"][0]["splits"]["train"]["num_tokens"] -= 7

    change_index(folder, lie)
    with pytest.raises(DataError, match="disagrees with the index"):
        ShardFolder.open(folder.path).documents("train", source="corpus")


def test_other_format_version_is_refused(folder: ShardFolder) -> None:
    change_index(folder, lambda index: index.update(format_version=99))
    with pytest.raises(DataError, match="format version 99"):
        ShardFolder.open(folder.path)


@pytest.mark.parametrize("name", ["../other.tar", "/etc/passwd", ".."])
def test_name_outside_the_folder_is_refused(folder: ShardFolder, name: str) -> None:
    change_index(folder, lambda index: shard_of(index).update(file=name))
    with pytest.raises(DataError, match="outside"):
        ShardFolder.open(folder.path)


def test_damaged_index_is_named(folder: ShardFolder) -> None:
    path = folder.path / "index.json"
    text = path.read_text()
    for content in (text[:100], "[]", "{}", text.replace('"size"', '"sise"'), ""):
        path.write_text(content)
        with pytest.raises(DataError, match=r"index\.json"):
            ShardFolder.open(folder.path)


def test_folder_without_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_pipeline\.build"):
        ShardFolder.open(tmp_path)


def test_documents_are_read_from_any_offset(folder: ShardFolder) -> None:
    documents = folder.documents("train", source="corpus")
    lengths = np.diff(documents.starts)
    assert documents.num_tokens == lengths.sum() == folder.num_tokens("train")
    assert documents.num_shards > 2
    whole = [documents.tokens(number) for number in range(documents.num_documents)]
    assert [len(tokens) for tokens in whole] == lengths.tolist()
    assert all(tokens[-1] == 256 and (tokens[:-1] < 256).all() for tokens in whole)
    random = np.random.default_rng(0)
    chosen = random.integers(0, documents.num_documents, 200)
    offsets = random.integers(0, lengths[chosen])
    counts = random.integers(1, lengths[chosen] - offsets + 1)
    out = np.zeros(counts.sum(), documents.dtype)
    places = np.cumsum(counts) - counts
    before = documents.read(chosen, offsets, counts, out=out, places=places)
    for document, offset, count, place, last in zip(
        chosen, offsets, counts, places, before, strict=True
    ):
        assert np.array_equal(out[place : place + count], whole[document][offset : offset + count])
        assert offset == 0 or last == whole[document][offset - 1]


def test_shards_are_opened_when_they_are_read_and_not_all_kept(
    folder: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    really_open = LocalFiles.open

    def open_noting(self: LocalFiles, name: str, **wanted: Any) -> BinaryIO:
        if name.endswith(".tar"):
            opened.append(name)
        return really_open(self, name, **wanted)

    monkeypatch.setattr(LocalFiles, "open", open_noting)
    monkeypatch.setattr(LocalFiles, "max_mapped", 2)
    documents = folder.documents("train", source="corpus")
    shards = [shard.file for shard in folder.source("corpus").splits["train"].shards]
    assert not opened
    last = documents.num_documents - 1
    one, other, middle = documents.tokens(0), documents.tokens(last), documents.tokens(last // 2)
    assert len(set(opened)) == len(opened) == 3
    assert {shards[0], shards[-1]} < set(opened)
    assert np.array_equal(documents.tokens(last // 2), middle)
    assert np.array_equal(documents.tokens(last), other)
    assert len(opened) == 3
    assert np.array_equal(documents.tokens(0), one)
    assert len(opened) == 4


SEQ_LEN = 16
NUM_DOCUMENTS = 60


@pytest.fixture
def numbered(tmp_path: Path) -> ShardFolder:
    """Documents of 11 tokens in shards of 10, which begin at 1, 11, 21, …"""
    return write_numbered(tmp_path / "numbered", {"en": [11] * NUM_DOCUMENTS})


def flip(folder: ShardFolder, document: int) -> Path:
    """Changes a bit in the middle of a training document."""
    shard = folder.source("en").splits["train"].shards[document // 10]
    offset = int(np.load(folder.path / shard.documents)[document % 10, 0])
    path = folder.path / shard.file
    content = bytearray(path.read_bytes())
    content[offset + 5 * 4] ^= 1
    path.write_bytes(content)
    return path


def epoch(folder: ShardFolder, *, num_ranks: int = 1, **data: Any) -> tuple[list[Batch], int]:
    """The batches of an epoch, each joined from its ranks, and the sequences in the epoch."""
    readers = [
        GlobalBatches(
            folder, seq_len=SEQ_LEN, global_batch_size=12, seed=0, data=DataSettings(**data)
        )
        for _ in range(num_ranks)
    ]
    number = readers[0].num_sequences["en"]
    batches = []
    for first in range(0, number, 12):
        parts = [
            reader.read(first, rank=rank, num_ranks=num_ranks)
            for rank, reader in enumerate(readers)
        ]
        batches.append(
            Batch(
                **{
                    name: np.concatenate([vars(part)[name] for part in parts])
                    for name in vars(parts[0])
                    if name != "num_corrupt"
                },
                num_corrupt=sum(part.num_corrupt for part in parts),
            )
        )
    return batches, number


def test_flipped_byte_is_found_where_it_is_read(numbered: ShardFolder) -> None:
    path = flip(numbered, 37)
    folder = ShardFolder.open(numbered.path)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{path.name}: its document 7 \(bytes \d+ to \d+\)"):
            epoch(folder)
    with pytest.raises(DataError, match="document 7"):
        folder.documents("train", source="en").tokens(37)
    assert folder.documents("train", source="en").tokens(36)[0] == 361


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_sequences_of_a_flipped_document_are_skipped_and_counted(
    numbered: ShardFolder, packing: str, num_ranks: int
) -> None:
    whole, _ = epoch(numbered, packing=packing)
    flip(numbered, 37)
    folder = ShardFolder.open(numbered.path, on_corrupt=OnCorrupt.skip)
    found, _ = epoch(folder, num_ranks=num_ranks, packing=packing, on_corrupt="skip")
    num_skipped = 0
    for before, after in zip(whole, found, strict=True):
        touched = (((before.targets - 1) // 10 == 37) & (before.targets != END)).any(axis=1)
        assert after.num_corrupt == touched.sum()
        num_skipped += after.num_corrupt
        assert not after.loss_mask[touched].any()
        assert (after.targets[touched] == END).all()
        assert (after.tokens[touched] == END).all()
        assert after.document_starts[touched].sum() == touched.sum()
        for name in ("tokens", "targets", "loss_mask", "document_starts"):
            assert np.array_equal(vars(after)[name][~touched], vars(before)[name][~touched])
    assert num_skipped >= 1


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_documents_of_a_lost_shard_are_skipped_and_counted(
    numbered: ShardFolder, damage: str
) -> None:
    whole, _ = epoch(numbered)
    shard = numbered.path / numbered.source("en").splits["train"].shards[2].file
    if damage == "missing":
        shard.unlink()
    else:
        with shard.open("r+b") as file:
            file.truncate(3000)
    with pytest.raises(DataError, match=shard.name):
        ShardFolder.open(numbered.path)
    folder = ShardFolder.open(numbered.path, on_corrupt=OnCorrupt.skip)
    assert list(folder.damaged) == [shard.name]
    with pytest.raises(DataError, match=rf"{shard.name}.*on_corrupt=skip"):
        epoch(folder)
    lost = [
        (((batch.targets - 1) // 100 == 2) & (batch.targets != END)).any(axis=1) for batch in whole
    ]
    # A sequence may hold of the lost documents only the end of the last one.
    ends = [(batch.tokens == 300).any(axis=1) for batch in whole]
    for num_ranks in (1, 4):
        found, _ = epoch(folder, num_ranks=num_ranks, on_corrupt="skip")
        for touched, end, before, after in zip(lost, ends, whole, found, strict=True):
            assert after.num_corrupt == (touched | end).sum()
            assert np.array_equal(after.loss_mask.any(axis=1), ~(touched | end))
            assert np.array_equal(
                after.loss_mask[~touched & ~end], before.loss_mask[~touched & ~end]
            )


def test_a_shard_lost_after_opening_is_refused_or_skipped(numbered: ShardFolder) -> None:
    whole, number = epoch(numbered)
    shard = numbered.path / numbered.source("en").splits["train"].shards[0].file
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name} is missing.*on_corrupt=skip"):
        epoch(numbered)
    found, _ = epoch(numbered, on_corrupt="skip")
    assert 0 < sum(batch.num_corrupt for batch in found) < number
    assert sum(batch.num_corrupt for batch in whole) == 0


def test_a_damaged_table_is_refused_even_when_skipping(numbered: ShardFolder) -> None:
    path = numbered.path / numbered.source("en").splits["train"].shards[0].documents
    table = np.load(path)
    table[0, 2] += 1
    np.save(path, table)
    folder = ShardFolder.open(numbered.path, on_corrupt=OnCorrupt.skip)
    with pytest.raises(DataError, match=path.name):
        folder.documents("train", source="en", on_corrupt=OnCorrupt.skip)


def test_what_a_folder_says_of_itself(folder: ShardFolder) -> None:
    assert folder.sources == ("corpus",)
    assert folder.tokenizer.vocab_size == 257
    tokens, num_bytes = folder.num_tokens("train"), folder.num_bytes("train")
    documents = folder.source("corpus").splits["train"].num_documents
    assert tokens == num_bytes + documents
    with pytest.raises(DataError, match="'other'"):
        folder.num_tokens("train", source="other")
    with pytest.raises(DataError, match="'test'"):
        folder.num_tokens("test")
