"""Inspection names every damaged file, also where index and hashes were made to fit the damage."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import DataError, ShardFolder
from data_pipeline.inspect import Format, InspectSettings, inspect
from data_pipeline.shards.index import sha256_of
from tests.data_pipeline.conftest import build, documents_of, write_corpus


def report(folder: ShardFolder, capsys: pytest.CaptureFixture[str], **settings: Any) -> Any:
    capsys.readouterr()
    inspect(InspectSettings(dir=str(folder.path), format=Format.json, **settings))
    return json.loads(capsys.readouterr().out)


@dataclass
class Member:
    """A member of a tar on its way into a changed one."""

    info: tarfile.TarInfo
    content: bytes


def change_shard(folder: ShardFolder, change: Callable[[list[Member]], None]) -> str:
    """Rewrites the first shard, with size and hash in the index as if it had always been so."""
    index = json.loads((folder.path / "index.json").read_text())
    shard = index["sources"][0]["splits"]["train"]["shards"][0]
    path = folder.path / shard["file"]
    with tarfile.open(path) as tar:
        files = [(info, tar.extractfile(info)) for info in tar]
        members = [Member(info, file.read()) for info, file in files if file is not None]
    assert len(members) == len(files), "a shard holds files alone"
    change(members)
    with tarfile.open(path, "w") as tar:
        for member in members:
            member.info.size = len(member.content)
            tar.addfile(member.info, io.BytesIO(member.content))
    shard.update(size=path.stat().st_size, sha256=sha256_of(path))
    (folder.path / "index.json").write_text(json.dumps(index))
    return str(shard["file"])


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def change_tokens(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[list[Member]], None]:
    def changed(members: list[Member]) -> None:
        members[3].content = npy(change(np.load(io.BytesIO(members[3].content))))

    return changed


def rename(name: str) -> Callable[[list[Member]], None]:
    def renamed(members: list[Member]) -> None:
        members[3].info.name = name

    return renamed


def link(members: list[Member]) -> None:
    members[3].info.type, members[3].info.linkname = tarfile.SYMTYPE, "/etc/passwd"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            change_tokens(lambda tokens: tokens + (np.arange(len(tokens)) == 5).astype("<u2")),
            "isn't where and what",
        ),
        (change_tokens(lambda tokens: tokens[1:]), "isn't where and what"),
        (change_tokens(lambda tokens: tokens[:-1]), "doesn't end its document"),
        (change_tokens(lambda tokens: tokens + np.uint16(9000)), "doesn't end its document"),
        (change_tokens(lambda tokens: tokens.astype("<u4")), "is uint32"),
        (change_tokens(lambda tokens: tokens[:, None]), "not uint16 [tokens]"),
        (lambda members: members.pop(), "fewer members than its table"),
        (lambda members: members.append(members[0]), "isn't where and what"),
        (lambda members: members.reverse(), "isn't where and what"),
        (rename("../../etc/cron.d/x.npy"), "has a member '../../etc/cron.d/x.npy'"),
        (rename("/etc/x.npy"), "has a member '/etc/x.npy'"),
        (rename("000000003.pkl"), "has a member '000000003.pkl'"),
        (rename("000000003.npy.pyd"), "has a member '000000003.npy.pyd'"),
        (rename("000000003.bin"), "has a member '000000003.bin'"),
        (link, "has a member"),
    ],
)
def test_shard_that_was_changed_with_its_hash_is_named(
    folder: ShardFolder,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[list[Member]], None],
    reason: str,
) -> None:
    name = change_shard(folder, change)
    with pytest.raises(DataError) as damaged:
        report(folder, capsys)
    assert f"{name}: " in str(damaged.value)
    assert reason in str(damaged.value)
    assert list(json.loads(capsys.readouterr().out)["damaged"]) == [name]


def test_pickled_member_is_never_unpickled(
    folder: ShardFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    def plant(members: list[Member]) -> None:
        members[0].content = npy(np.array([Bomb()], dtype=object))

    change_shard(folder, plant)
    with pytest.raises(DataError, match="Object arrays cannot be loaded"):
        report(folder, capsys)
    assert not (tmp_path / "exploded").exists()


def test_every_damaged_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus")
    folder = build(tmp_path / "corpus", tmp_path / "to", tokenizer="bpe:300", shard_tokens=2000)
    train = folder.source("corpus").splits["train"].shards
    validation = folder.source("corpus").splits["validation"].shards
    flipped = folder.path / train[0].file
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (folder.path / train[1].file).unlink()
    (folder.path / train[2].documents).write_bytes(b"")
    with (folder.path / validation[0].file).open("r+b") as file:
        file.truncate(1000)
    definition = folder.path / "tokenizer.json"
    definition.write_text(definition.read_text().replace("Ġ", "Ħ"))
    with pytest.raises(DataError, match="is damaged: ") as damaged:
        report(folder, capsys)
    found = json.loads(capsys.readouterr().out)["damaged"]
    assert set(found) == {
        "tokenizer.json",
        train[0].file,
        train[1].file,
        train[2].documents,
        validation[0].file,
    }
    assert "is missing" in found[train[1].file]
    assert f"has 1000 bytes and should have {validation[0].size}" in found[validation[0].file]
    assert all(name in str(damaged.value) for name in found)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_sound_folder_shows_the_beginnings_of_its_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: str
) -> None:
    for seed, name in enumerate(("en", "fr")):
        write_corpus(tmp_path / name, seed=seed, num_documents=40)
    (tmp_path / "fr" / "short.txt").write_text("né")
    sources = {name: tmp_path / name for name in ("en", "fr")}
    folder = build(sources, tmp_path / "to", tokenizer=tokenizer, shard_tokens=2000)
    shown = report(folder, capsys, num_samples=50, sample_tokens=20)
    assert shown["damaged"] == {}
    for source in shown["sources"]:
        name = source["name"]
        splits = ("train", "validation")
        expected = [text for s in splits for text in documents_of(folder, s, source=name)]
        samples = source["samples"]
        assert len(samples) == len(expected)
        for sample, text in zip(samples, expected, strict=True):
            assert text.startswith(sample["text"])
            assert sample["cut"] == (sample["text"] != text)
            assert sample["text"]
        assert {sample["split"] for sample in samples} == set(splits)
    assert any(not sample["cut"] for sample in shown["sources"][1]["samples"])
    assert sum(source["share"] for source in shown["sources"]) == pytest.approx(1)


def test_samples_follow_from_the_seed(
    folder: ShardFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def texts(seed: int) -> list[str]:
        shown = report(folder, capsys, num_samples=5, seed=seed)
        return [sample["text"] for sample in shown["sources"][0]["samples"]]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert len(set(texts(1))) == 5


def test_what_would_steer_a_terminal_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("harmless \x1b]0;evil\x07\x9b2J words\n\tü")
    folder = build(tmp_path / "corpus", tmp_path / "to", validation_fraction=0.0)
    inspect(InspectSettings(dir=str(folder.path)))
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)
    assert "harmless \ufffd]0;evil\ufffd\ufffd2J words\n\tü" in shown


def test_missing_file_is_named_without_verification_too(folder: ShardFolder) -> None:
    shard = folder.source("corpus").splits["train"].shards[1]
    (folder.path / shard.file).unlink()
    with pytest.raises(DataError, match=f"{shard.file} is missing"):
        inspect(InspectSettings(dir=str(folder.path), verify=False))
