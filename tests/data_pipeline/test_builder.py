"""A shard folder holds its text, is the same however it is built, and appears whole or not."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import (
    BuildSettings,
    DataError,
    DataSettings,
    ShardFolder,
    build_shards,
    open_or_build,
    resolved_dir,
    tokenizer_named,
)
from data_pipeline.builder import split_of
from tests.data_pipeline.conftest import build, write_corpus


def documents_of(folder: ShardFolder, split: str) -> list[str]:
    documents = folder.documents(split, source=folder.sources[0])
    decode = tokenizer_named(folder.tokenizer.name).decode
    return [decode(documents.tokens(number)) for number in range(documents.num_documents)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tokenizer", ["bytes", "mixtral-v1"])
def test_text_survives_the_round_trip(tmp_path: Path, tokenizer: str) -> None:
    texts = write_corpus(tmp_path / "corpus")
    folder = build(tmp_path / "corpus", tmp_path / "to", tokenizer=tokenizer, shard_tokens=1500)
    splits = {split: documents_of(folder, split) for split in ("train", "validation")}
    for split, found in splits.items():
        expected = [
            text
            for text in texts
            if split_of(hashlib.sha256(text.encode()).digest(), validation_fraction=0.2) == split
        ]
        assert found == expected
        assert folder.num_bytes(split) == sum(len(text.encode()) for text in expected)
    assert all(splits.values())
    assert len(folder.source("corpus").splits["train"].shards) > 1
    folder.verify()


@pytest.mark.parametrize("tokenizer", ["bytes", "mixtral-v3"])
def test_same_bytes_whatever_the_processes(tmp_path: Path, tokenizer: str) -> None:
    write_corpus(tmp_path / "corpus", num_documents=80)
    for number in range(6):  # each long enough to be a batch of its own, the first by far
        words = f"many words {number} " * (5 if number else 20) * 5000
        (tmp_path / "corpus" / f"long{number}.txt").write_text(words)
    one = build(tmp_path / "corpus", tmp_path / "one", tokenizer=tokenizer, num_processes=1)
    two = build(tmp_path / "corpus", tmp_path / "two", tokenizer=tokenizer, num_processes=2)
    assert contents(one.path) == contents(two.path)


def test_split_depends_on_content_alone(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "forward")
    (tmp_path / "backward").mkdir()
    for number, text in enumerate(reversed(texts[::2])):
        (tmp_path / "backward" / f"{number:04d}.md").write_text(text, encoding="utf-8")
    forward = build(tmp_path / "forward", tmp_path / "a")
    backward = build(tmp_path / "backward", tmp_path / "b")
    held_out = set(documents_of(forward, "validation"))
    assert set(documents_of(backward, "validation")) == held_out & set(texts[::2])


def test_split_is_what_sha256sum_says() -> None:
    for text in (str(number).encode() for number in range(300)):
        share = int(hashlib.sha256(text).hexdigest()[:8], 16) % 100
        split = split_of(hashlib.sha256(text).digest(), validation_fraction=0.2)
        assert split == ("validation" if share < 20 else "train")


def test_split_takes_its_fraction() -> None:
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(20_000)]
    for fraction in (0.0, 0.005, 0.05, 0.5):
        found = np.mean(
            [split_of(d, validation_fraction=fraction) == "validation" for d in digests]
        )
        # Five standard deviations of a binomial share.
        assert abs(found - fraction) <= 5 * np.sqrt(fraction * (1 - fraction) / len(digests))


def test_plain_webdataset_reads_the_shards(folder: ShardFolder) -> None:
    import webdataset

    shards = folder.source("corpus").splits["train"].shards
    urls = [str(folder.path / shard.file) for shard in shards]
    samples = webdataset.WebDataset(urls, shardshuffle=False).decode()
    found = np.concatenate([sample["npy"] for sample in samples])
    documents = folder.documents("train", source="corpus")
    every = [documents.tokens(number) for number in range(documents.num_documents)]
    assert np.array_equal(found, np.concatenate(every))
    assert found.dtype == np.uint16


def test_document_longer_than_a_shard_has_one_to_itself(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", num_documents=3)
    (tmp_path / "corpus" / "0001.txt").write_text("x" * 20_000)
    folder = build(tmp_path / "corpus", tmp_path / "to", validation_fraction=0.0)
    sizes = [shard.num_tokens for shard in folder.source("corpus").splits["train"].shards]
    assert sizes[1] == 20_001
    assert len(sizes) == 3
    assert len(documents_of(folder, "train")) == 3


def test_built_folder_is_taken_as_it_is(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "to")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "to").iterdir()}
    build(corpus, tmp_path / "to", num_processes=2)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "to").iterdir()}


def test_folder_of_something_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "to")
    with pytest.raises(DataError, match="tokenizer='bytes', not tokenizer='mixtral-v1'"):
        build(corpus, tmp_path / "to", tokenizer="mixtral-v1")
    with pytest.raises(DataError, match="is no shard folder"):
        build(corpus, corpus)


def test_no_folder_is_left_by_a_build_that_fails(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError, match="no document to train on"):
        build(tmp_path / "corpus", tmp_path / "to")
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "good"}\nbad\n')
    with pytest.raises(DataError, match="line 2"):
        build(tmp_path / "corpus", tmp_path / "to")
    assert os.listdir(tmp_path) == ["corpus"]


def test_left_out_documents_stand_in_the_index(corpus: Path, tmp_path: Path) -> None:
    (corpus / "twin.txt").write_bytes((corpus / "0000.txt").read_bytes())
    (corpus / "latin.txt").write_bytes(b"\xe9t\xe9")
    folder = build(corpus, tmp_path / "to")
    left_out = folder.source("corpus").num_left_out
    assert left_out == {"not_utf8": 1, "empty": 0, "duplicate": 1}


def test_unsafe_source_name_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name='\.\./x'"):
        build(corpus, tmp_path / "to", name="../x")


def test_open_or_build_makes_the_corpus_of_the_settings(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = DataSettings(corpus=str(corpus))
    assert resolved_dir(settings) == tmp_path / "data" / "corpus-bytes"
    folder = open_or_build(settings, progress=False)
    assert folder.path == resolved_dir(settings)
    assert open_or_build(settings, progress=False).index == folder.index
    with pytest.raises(DataError, match="not a shard folder"):
        open_or_build(DataSettings(dir=str(tmp_path / "nowhere")), progress=False)


def test_baselines_are_those_of_a_plain_count(tmp_path: Path) -> None:
    import zlib

    write_corpus(tmp_path / "corpus", num_documents=40)
    folder = build(tmp_path / "corpus", tmp_path / "to")
    counts = np.ones((257, 256))
    for text in documents_of(folder, "train"):
        for before, byte in zip([256, *text.encode()], text.encode(), strict=False):
            counts[before, byte] += 1
    bits = 0.0
    held_out = documents_of(folder, "validation")
    for text in held_out:
        for before, byte in zip([256, *text.encode()], text.encode(), strict=False):
            bits -= np.log2(counts[before, byte] / counts[before].sum())
    content = "".join(held_out).encode()
    found = folder.baselines["corpus"]
    assert found.byte_bigram_bits_per_byte == pytest.approx(bits / len(content), rel=1e-12)
    assert found.zlib_bits_per_byte == 8 * len(zlib.compress(content, 9)) / len(content)


def test_settings_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="validation_fraction"):
        BuildSettings(corpus="a", tokenizer="bytes", to="b", validation_fraction=1.0)
    with pytest.raises(ValueError, match="num_processes"):
        build_shards(BuildSettings(corpus="a", tokenizer="bytes", to="b", num_processes=0))
