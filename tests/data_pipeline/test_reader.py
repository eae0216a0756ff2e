"""A shard folder that isn't what its index says is refused, with the file's name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import DataError, ShardFolder


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
    with pytest.raises(DataError, match=shard.name):
        ShardFolder.open(folder.path).verify()


def test_changed_table_of_documents_is_found_when_reading(folder: ShardFolder) -> None:
    table = folder.path / folder.source("corpus").splits["train"].shards[0].documents
    documents = np.load(table)
    documents[0, 1] += 1
    np.save(table, documents)
    with pytest.raises(DataError, match=table.name):
        ShardFolder.open(folder.path).stream("train")


def test_index_that_lies_about_tokens_is_found(folder: ShardFolder) -> None:
    def lie(index: dict[str, Any]) -> None:
        shard_of(index)["num_tokens"] -= 7
        index["sources"][0]["splits"]["train"]["num_tokens"] -= 7

    change_index(folder, lie)
    with pytest.raises(DataError, match="disagrees with the index"):
        ShardFolder.open(folder.path).stream("train")


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
    for damaged in (text[:100], "[]", "{}", text.replace('"size"', '"sise"'), ""):
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"index\.json"):
            ShardFolder.open(folder.path)


def test_folder_without_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_pipeline\.build"):
        ShardFolder.open(tmp_path)


def test_stream_reads_the_same_from_any_start(folder: ShardFolder) -> None:
    stream = folder.stream("train")
    whole = np.empty(stream.num_tokens + 1, dtype=np.int64)
    stream.read(0, whole)
    random = np.random.default_rng(0)
    for start in [*random.integers(0, stream.num_tokens, 200).tolist(), stream.num_tokens]:
        out = np.full(500, -1, dtype=np.int64)
        filled = stream.read(start, out)
        assert filled == min(500, stream.num_tokens + 1 - start)
        assert np.array_equal(out[:filled], whole[start : start + filled])
        assert (out[filled:] == -1).all()


def test_what_a_folder_says_of_itself(folder: ShardFolder) -> None:
    assert folder.sources == ("corpus",)
    assert folder.tokenizer.vocab_size == 257
    tokens, num_bytes = folder.num_tokens("train"), folder.num_bytes("train")
    documents = folder.source("corpus").splits["train"].num_documents
    assert tokens == num_bytes + documents
    assert folder.bytes_per_token("train", source="corpus") == num_bytes / tokens
    with pytest.raises(DataError, match="'other'"):
        folder.num_tokens("train", source="other")
    with pytest.raises(DataError, match="'test'"):
        folder.num_tokens("test")
