"""A shard folder holds its text, is the same however it is built, and is created atomically."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

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
)
from data_pipeline.building.splits import split_of
from data_pipeline.corpora.raw_documents import reading_report
from data_pipeline.settings import SourceSettings
from data_pipeline.shards.unfinished import FinishedShard
from data_pipeline.shards.writer import SplitWriter
from tests.data_pipeline.conftest import build, contents, damaged, documents_of, write_corpus

REPOSITORY = Path(__file__).parents[2]


def write_json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def expected_documents(texts: list[str], split: str) -> list[str]:
    def is_of_split(text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()
        return split_of(digest, validation_fraction=0.2) == split

    return [text for text in texts if is_of_split(text)]


@pytest.mark.parametrize("tokenizer", ["bytes", "mixtral-v1", "bpe:400"])
def test_text_survives_the_round_trip(tmp_path: Path, tokenizer: str) -> None:
    texts = write_corpus(tmp_path / "corpus")
    folder = build(tmp_path / "corpus", tmp_path / "to", tokenizer=tokenizer, shard_tokens=1500)
    for split in ("train", "validation"):
        expected = expected_documents(texts, split)
        assert expected
        assert documents_of(folder, split) == expected
        assert folder.num_bytes(split) == sum(len(text.encode()) for text in expected)
    assert len(folder.source("corpus").splits["train"].shards) > 1
    assert not damaged(folder)


@pytest.mark.parametrize("tokenizer", ["bytes", "mixtral-v3"])
def test_same_bytes_whatever_the_processes(tmp_path: Path, tokenizer: str) -> None:
    write_corpus(tmp_path / "corpus", num_documents=80)
    for number in range(6):  # each long enough to be a batch of its own, the first by far
        words = f"many words {number} " * (5 if number else 20) * 5000
        (tmp_path / "corpus" / f"long{number}.txt").write_text(words)
    one = build(tmp_path / "corpus", tmp_path / "one", tokenizer=tokenizer, num_processes=1)
    two = build(tmp_path / "corpus", tmp_path / "two", tokenizer=tokenizer, num_processes=2)
    assert contents(one.path) == contents(two.path)


def test_same_bytes_whatever_the_hash_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("de", "fr"):
        write_corpus(tmp_path / name, seed=ord(name[0]), num_documents=30)
    program = """if __name__ == "__main__":
        import sys
        from data_pipeline import BuildSettings, build_shards
        build_shards(BuildSettings(
            sources={"fr": {"corpus": "fr"}, "de": {"corpus": "de"}}, tokenizer="bpe:300",
            to=sys.argv[1], shard_tokens=2000, num_processes=1), progress=False)"""
    monkeypatch.chdir(tmp_path)
    chosen = {"tokenizer": "bpe:300", "shard_tokens": 2000, "validation_fraction": 0.05}
    here = build({"fr": Path("fr"), "de": Path("de")}, tmp_path / "here", **chosen)
    subprocess.run(
        [sys.executable, "-c", program, "there"],
        # That of this process is another: by chance, where none is given.
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "2"},
        check=True,
        timeout=60,
    )
    assert contents(tmp_path / "there") == contents(here.path)


def test_sources_stay_apart_in_the_order_given(tmp_path: Path) -> None:
    texts = {
        name: write_corpus(tmp_path / name, num_documents=30, seed=seed)
        for seed, name in enumerate(("fr", "de", "en"))
    }
    settings = BuildSettings(
        sources={
            name: SourceSettings(
                corpus=str(tmp_path / name), language=name, licence=f"licence of {name}"
            )
            for name in texts
        },
        to=str(tmp_path / "to"),
        tokenizer="bytes",
        shard_tokens=3000,
        validation_fraction=0.2,
    )
    folder = build_shards(settings, progress=False)
    assert folder.sources == ("fr", "de", "en")
    for name, expected in texts.items():
        source = folder.source(name)
        assert (source.language, source.licence) == (name, f"licence of {name}")
        for split in ("train", "validation"):
            assert documents_of(folder, split, source=name) == expected_documents(expected, split)
        assert all(shard.file.startswith(f"{name}-") for shard in source.splits["train"].shards)
    assert not damaged(folder)
    turned = dict(reversed(settings.sources.items()))
    with pytest.raises(DataError, match="holds shards built with sources="):
        build_shards(replace(settings, sources=turned), progress=False)


def test_duplicates_are_dropped_over_all_sources_and_counted_for_each(tmp_path: Path) -> None:
    first = write_json_lines(tmp_path / "first.jsonl", ["a", "b", "a", "c"])
    second = write_json_lines(tmp_path / "second.jsonl", ["c", "d", "b", "b", "e"])
    folder = build({"first": first, "second": second}, tmp_path / "to", validation_fraction=0.0)
    assert documents_of(folder, "train", source="first") == ["a", "b", "c"]
    assert documents_of(folder, "train", source="second") == ["d", "e"]
    counts = [source.num_left_out["duplicate"] for source in folder.index.sources]
    assert counts == [1, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"add corpus=… for one source, or sources\.NAME\.corpus=…"),
        (
            {"corpus": "a", "sources": {"en": {"corpus": "b"}}},
            "corpus='a' describes a build's only",
        ),
        ({"licence": "MIT", "sources": {"en": {"corpus": "b"}}}, "licence='MIT' describes"),
        ({"sources": {"e/n": {"corpus": "b"}}}, "name='e/n' goes into file names"),
        ({"sources": {"": {"corpus": "b"}}}, "name='' goes into file names"),
        ({"corpus": "a", "name": "../x"}, r"name='\.\./x'"),
        ({"corpus": "ü.jsonl"}, "gives no name for its source; give one with name=NAME"),
    ],
)
def test_sources_that_cannot_be_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build_shards(BuildSettings(to=str(tmp_path / "to"), tokenizer="bytes", **settings))
    assert os.listdir(tmp_path) == []


def test_file_with_blanks_and_letters_of_its_own_is_built(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    corpus = write_json_lines(tmp_path / "a b" / "ü.jsonl", ["größer", "naïve"])
    folder = build(corpus, tmp_path / "ein Ordner für é", name="u", validation_fraction=0.0)
    assert documents_of(folder, "train", source="u") == ["größer", "naïve"]
    assert not damaged(folder)


def test_trained_tokenizer_lies_in_the_folder(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "corpus")
    folder = build(tmp_path / "corpus", tmp_path / "to", tokenizer="bpe:400")
    entry = folder.tokenizer
    assert (entry.name, entry.vocab_size, entry.file) == ("bpe:400", 400, "tokenizer.json")
    before = contents(folder.path)
    build(tmp_path / "corpus", tmp_path / "to", tokenizer="bpe:400")
    assert contents(folder.path) == before
    with pytest.raises(DataError, match="tokenizer='bpe:400', not tokenizer='bpe:300'"):
        build(tmp_path / "corpus", tmp_path / "to", tokenizer="bpe:300")
    # As a file of its own it is the same tokenizer again.
    definition = folder.path / "tokenizer.json"
    copied = build(tmp_path / "corpus", tmp_path / "copied", tokenizer=str(definition))
    assert documents_of(copied, "train") == expected_documents(texts, "train")
    assert copied.tokenizer.fingerprint == entry.fingerprint
    after = contents(copied.path)
    assert after.pop("index.json") != before.pop("index.json")  # it says how it was made
    assert after == before


def test_tokenizer_is_trained_on_training_text_of_every_source(tmp_path: Path) -> None:
    texts = [f"{number} {'held out ' * 60}" for number in range(40)]
    held_out = expected_documents(texts, "validation")
    assert len(held_out) > 1
    common = [
        f"{number} {'lorem ipsum zyzzyva quux'[12 * (number % 2) :][:11] * 30}"
        for number in range(20)
    ]
    one = write_json_lines(tmp_path / "one.jsonl", common[::2])
    two = write_json_lines(tmp_path / "two.jsonl", [*common[1::2], *held_out])
    folder = build({"one": one, "two": two}, tmp_path / "to", tokenizer="bpe:275")
    vocabulary = "".join(json.loads((folder.path / "tokenizer.json").read_text())["model"]["vocab"])
    assert "ipsum" in vocabulary
    assert "zyzzyva" in vocabulary
    assert "held" not in vocabulary


def test_source_without_training_text_ends_the_build(tmp_path: Path) -> None:
    good = write_json_lines(tmp_path / "good.jsonl", [str(number) for number in range(40)])
    bad = write_json_lines(tmp_path / "bad.jsonl", ["1", "2"])
    with pytest.raises(DataError, match=r"source bad .*no document to train on: 0 for.*2 dupl"):
        build({"good": good, "bad": bad}, tmp_path / "to", shard_tokens=10)
    texts = expected_documents([str(number) for number in range(100)], "validation")
    held_out = write_json_lines(tmp_path / "held.jsonl", texts)
    with pytest.raises(DataError, match=rf"source held .*to train on: {len(texts)} for validation"):
        build(held_out, tmp_path / "to", shard_tokens=10)
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "good.jsonl", "held.jsonl"]


def test_corrupt_documents_end_the_build_or_are_counted(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "good"}\nbad\n{"text": "better"}\n')
    with pytest.raises(DataError, match="line 2"):
        build(corpus, tmp_path / "to", on_corrupt="fail", validation_fraction=0.0)
    assert os.listdir(tmp_path) == ["corpus.jsonl"]
    folder = build(corpus, tmp_path / "to", on_corrupt="skip", validation_fraction=0.0)
    assert documents_of(folder, "train") == ["good", "better"]
    assert folder.source("corpus").num_left_out["corrupt"] == 1
    with pytest.raises(DataError, match="on_corrupt"):
        build(corpus, tmp_path / "to", on_corrupt="fail", validation_fraction=0.0)


def test_document_that_is_too_long_ends_the_build_or_is_counted(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("é" * 51)  # 102 bytes
    (corpus / "b.jsonl").write_text('{"text": "' + "é" * 51 + '"}\n{"text": "' + "é" * 50 + '"}\n')
    given: dict[str, Any] = {"max_document_bytes": 100, "validation_fraction": 0.0}
    with pytest.raises(DataError, match=r"a\.txt has 102 bytes, more than max_document_bytes=100;"):
        build(corpus, tmp_path / "to", **given)
    folder = build(corpus, tmp_path / "to", on_corrupt="skip", **given)
    assert documents_of(folder, "train") == ["é" * 50]
    assert folder.source("corpus").left_out_examples["corrupt"] == ("a.txt", "b.jsonl, line 1")
    with pytest.raises(DataError, match="built with max_document_bytes=100, not max_document_byt"):
        build(corpus, tmp_path / "to", on_corrupt="skip", validation_fraction=0.0)
    usual = build(corpus, tmp_path / "usual", validation_fraction=0.0)
    assert len(documents_of(usual, "train")) == 2  # one is a duplicate
    assert b"max_document_bytes" not in (usual.path / "index.json").read_bytes()


def test_whole_text_is_the_same_whatever_would_become_of_a_corrupt_one(
    corpus: Path, tmp_path: Path
) -> None:
    built = build(corpus, tmp_path / "to", on_corrupt="fail")
    assert build(corpus, tmp_path / "to", on_corrupt="skip").index == built.index


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
    found = [sample["npy"] for sample in samples]
    assert all(tokens.dtype == np.uint16 for tokens in found)
    texts = [bytes(tokens[:-1].tolist()).decode() for tokens in found]
    assert texts == documents_of(folder, "train")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_members_are_what_numpy_saves(tmp_path: Path, dtype: str) -> None:
    sizes = [1, 9, 10, 100_000]
    kept: list[FinishedShard] = []
    with SplitWriter(
        tmp_path, source="a", split="train", shard_tokens=10**9, keep=kept.append
    ) as writer:
        for number, size in enumerate(sizes):
            tokens = np.arange(size).astype(dtype)
            writer.write(tokens, content=b"a", number=number, digest=bytes(32))
    assert kept[0].entry.num_tokens == sum(sizes)
    with tarfile.open(tmp_path / kept[0].entry.file) as tar:
        for member, size in zip(tar, sizes, strict=True):
            saved = io.BytesIO()
            np.save(saved, np.arange(size).astype(dtype))
            file = tar.extractfile(member)
            assert file is not None
            assert file.read() == saved.getvalue()


def test_shards_are_byte_for_byte_what_webdataset_writes(tmp_path: Path) -> None:
    from webdataset.writer import TarWriter

    kept: list[FinishedShard] = []
    # Of all lengths of a member's last block, and one that is written in pieces; and of numbers
    # with more digits than a name usually has.
    numbers = [0, 7, 123_456_789, 12_345_678_901]
    sizes = [*range(1, 600, 7), 3 * 2**20]
    expected = io.BytesIO()
    with (
        SplitWriter(
            tmp_path, source="a", split="train", shard_tokens=10**9, keep=kept.append
        ) as writer,
        TarWriter(expected, mtime=0) as tar,
    ):
        for place, size in enumerate(sizes):
            number = numbers[place % 4] + place
            tokens = np.arange(size).astype("<u2")
            saved = io.BytesIO()
            np.save(saved, tokens)
            writer.write(tokens, content=b"a", number=number, digest=bytes(32))
            tar.write({"__key__": f"{number:09d}", "npy": saved.getvalue()})
    content = (tmp_path / kept[0].entry.file).read_bytes()
    assert content == expected.getvalue()
    assert kept[0].entry.size == len(content)
    assert kept[0].entry.sha256 == hashlib.sha256(content).hexdigest()


def test_tar_lists_a_shard(folder: ShardFolder) -> None:
    shard = folder.source("corpus").splits["train"].shards[0]
    listed = subprocess.run(
        ["tar", "--list", "--verbose", "--file", str(folder.path / shard.file)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stderr == ""
    assert len(listed.stdout.splitlines()) == shard.num_documents


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
    assert left_out == {"not_utf8": 1, "empty": 0, "duplicate": 1, "corrupt": 0}


def test_open_or_build_makes_the_corpus_of_the_settings(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = DataSettings(corpus=str(corpus))
    assert resolved_dir(settings) == str(tmp_path / "data" / "corpus-bytes")
    folder = open_or_build(settings, progress=False)
    assert str(folder.path) == resolved_dir(settings)
    assert open_or_build(settings, progress=False).index == folder.index
    with pytest.raises(DataError, match="not a shard folder"):
        open_or_build(DataSettings(dir=str(tmp_path / "nowhere")), progress=False)


def test_baselines_are_those_of_a_plain_count(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("s3://key:secret@b/x", r"to='s3://b/x' is on a server.*copy it there"),
        ("gs://b/x", "to='gs://b/x' is on a server"),
        ("taken/x", r"to='taken/x' can't be made: .*taken.*Not a directory; give a folder"),
        ("/proc/x", r"to='/proc/x' can't be made: .*No such file.*; give a folder"),
        ("a" * 300, r"can't be made: .*File name too long; give a folder"),
    ],
)
def test_place_where_no_folder_can_be_is_refused_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("text")
    with pytest.raises(DataError, match=message):
        build_shards(BuildSettings(corpus="taken", tokenizer="bytes", to=to), progress=False)
    assert os.listdir() == ["taken"]


def test_run_where_no_shards_can_be_built_is_told_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").write_text("text")
    with pytest.raises(DataError, match=r"data\.corpus='data' can't be made.*data\.dir=…"):
        open_or_build(DataSettings(corpus="data"), progress=False)


def test_objects_without_a_text_beside_text_name_the_fields_there_are(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(30):
        (corpus / f"{number}.txt").write_text(f"text {number}")
        (corpus / f"{number}.json").write_text(json.dumps({"content": f"a {number}"}))
    build(corpus, tmp_path / "to")
    (source,) = ShardFolder.open(tmp_path / "to").index.sources
    report = reading_report(asdict(source))
    assert report.count("but content; name the field by text_field=") == 1
    assert "30 no text (0.json, line 1 has no 'text' field" in report
