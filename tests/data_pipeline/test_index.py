"""An inconsistent index is refused, naming the field or figure that shows it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import DataError, ShardFolder
from data_pipeline.settings import CacheSettings
from data_pipeline.shards.index import parsed_index, read_index
from data_pipeline.storage import open_files
from tests.data_pipeline.conftest import build, files_of, write_corpus

Lie = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The index of a folder of two sources."""
    root = tmp_path_factory.mktemp("index")
    for seed, name in enumerate(("en", "fr")):
        write_corpus(root / name, seed=seed, num_documents=40)
    folder = build({"en": root / "en", "fr": root / "fr"}, root / "tokens")
    return (folder.path / "index.json").read_bytes()


def split(index: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = index["sources"][0]["splits"]["train"]
    return found


def shard(index: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = split(index)["shards"][0]
    return found


def both(index: dict[str, Any], **changes: int) -> None:
    """Changes a shard's figures and its split's alike, so that they add up."""
    for key, value in changes.items():
        split(index)[key] += value - shard(index)[key]
        shard(index)[key] = value


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda i: i.update(format_version=1), "format version 1, and this program reads 2"),
        (lambda i: i.update(format_version="2"), "format version '2'"),
        (lambda i: i.update(extra=1), "extra: Unexpected"),
        (lambda i: i.update(dtype="uint32"), "dtype 'uint32', where bytes is stored as 'uint16'"),
        (lambda i: i.update(dtype=None), "dtype: Input should be"),
        (lambda i: i.update(tokenizer=None), "tokenizer: Input should be"),
        (lambda i: i.update(sources=[]), "no sources"),
        (lambda i: i["sources"].pop(), "sources en, built from en, fr"),
        (lambda i: i["sources"].reverse(), "sources fr, en, built from en, fr"),
        (lambda i: i["sources"][1].update(name="en"), "sources en, en, of which one stands twice"),
        (lambda i: i["sources"][0].update(name="../en"), "sources.0.name"),
        (lambda i: i["tokenizer"].update(vocab_size=0), "tokenizer.vocab_size"),
        (lambda i: i["tokenizer"].update(end_of_document=257), "257 is no id below 257"),
        (lambda i: i["tokenizer"].update(end_of_document=-1), "tokenizer.end_of_document"),
        (lambda i: i["tokenizer"].update(fingerprint="ab"), "tokenizer.fingerprint"),
        (lambda i: i["tokenizer"].update(file="../../etc/passwd"), "outside its folder"),
        (lambda i: split(i).update(num_tokens=5), "num_tokens 5, and its shards"),
        (lambda i: split(i).update(num_documents=5), "num_documents 5, and its shards"),
        (lambda i: split(i).update(num_bytes=5), "num_bytes 5, and its shards"),
        (lambda i: split(i)["shards"].pop(), "and its shards"),
        (
            lambda i: split(i)["shards"].reverse(),
            "outside its folder or isn't 'en-train-00000.tar'",
        ),
        (lambda i: split(i)["shards"].append(shard(i)), "and its shards"),
        (lambda i: shard(i).update(file="../other.tar"), "'../other.tar', which is outside"),
        (lambda i: shard(i).update(file="/etc/passwd"), "'/etc/passwd', which is outside"),
        (lambda i: shard(i).update(documents="x.npy"), "'x.npy', which is outside"),
        (lambda i: shard(i).update(sha256="0" * 63), "shards.0.sha256"),
        (lambda i: shard(i).update(documents_sha256="G" * 64), "shards.0.documents_sha256"),
        (lambda i: shard(i).update(size=-512), "shards.0.size"),
        (lambda i: shard(i).update(size=513), "can't hold its documents in 513 bytes"),
        (lambda i: shard(i).update(size=512), "can't hold its documents in 512 bytes"),
        (lambda i: shard(i).update(size=1e4), "shards.0.size"),
        (lambda i: shard(i).update(size="10240"), "shards.0.size"),
        (lambda i: shard(i).update(num_tokens=-1), "shards.0.num_tokens"),
        (lambda i: shard(i).update(num_documents=True), "shards.0.num_documents"),
        (lambda i: both(i, num_documents=0), "shards.0.num_documents"),
        (lambda i: both(i, num_tokens=3), "can't have 3 tokens"),
        (lambda i: both(i, num_bytes=3), "and 3 bytes of text"),
        (lambda i: i["sources"][0]["splits"].pop("validation"), "has splits train"),
        (lambda i: i["sources"][0]["splits"].update(test=split(i)), "has splits"),
        (lambda i: i["sources"][0]["num_left_out"].update(empty=-1), "num_left_out.empty"),
        (lambda i: i["sources"][0]["baselines"].update(zlib_bits_per_byte=-1.0), "zlib"),
        (lambda i: i["build"].update(validation_fraction=float("nan")), "validation_fraction"),
        (lambda i: i["build"].update(on_corrupt="maybe"), "on_corrupt"),
    ],
)
def test_index_that_lies_is_refused(honest: bytes, lie: Lie, message: str) -> None:
    index = json.loads(honest)
    lie(index)
    with pytest.raises(DataError) as refused:
        parsed_index(json.dumps(index).encode(), where="index.json")
    assert message in str(refused.value)
    assert str(refused.value).startswith("index.json ")


def test_honest_index_is_read_as_it_was_written(honest: bytes) -> None:
    assert parsed_index(honest, where="index.json").format_version == 2


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"null", b"\xff", b'{"format_version": 2}'])
def test_what_is_no_index_is_refused(text: bytes) -> None:
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        parsed_index(text, where="index.json")


def test_cut_index_is_refused_wherever_it_is_cut(folder: ShardFolder) -> None:
    path = folder.path / "index.json"
    text = path.read_bytes()
    for length in range(0, len(text) - 2, 97):
        path.write_bytes(text[:length])
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            read_index(files_of(folder))


def test_folder_without_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_pipeline\.build corpus="):
        read_index(open_files(str(tmp_path), cache=CacheSettings()))
