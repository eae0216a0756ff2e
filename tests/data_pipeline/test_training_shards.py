"""A text that `data.dir` names: its shards are built once into a cache, and found there again."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import (
    BuildSettings,
    DataError,
    DataSettings,
    PlannedBuild,
    ShardFolder,
    build_shards,
    open_or_build,
    opened_or_planned,
)
from data_pipeline.corpora.corpus_files import is_text
from data_pipeline.settings import CacheSettings, OnCorrupt
from data_pipeline.shards.unfinished import UnfinishedBuild
from tests.data_pipeline.conftest import build, contents, documents_of, in_child


def of(text: Path, *, cache: Path | None = None, **more: Any) -> DataSettings:
    folder = cache or text.parent / "cache"
    return DataSettings(dir=str(text), cache=CacheSettings(dir=str(folder)), **more)


def built(data: DataSettings) -> ShardFolder:
    return open_or_build(data, progress=False)


def holds(folder: ShardFolder, text: str) -> bool:
    return any(text in documents_of(folder, split) for split in ("train", "validation"))


def written_at(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_is_built_as_a_build_would_and_the_second_time_it_is_there(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_or_build(of(corpus))
    assert first.path.is_relative_to(tmp_path / "cache" / "built")
    assert f"building the shards of {corpus} in {first.path}" in capsys.readouterr().err
    plain = BuildSettings(corpus=str(corpus), tokenizer="bytes", to=str(tmp_path / "plain"))
    assert contents(build_shards(plain, progress=False).path) == contents(first.path)
    before = written_at(tmp_path / "cache")
    assert open_or_build(of(corpus)).path == first.path
    assert f"are in {first.path}; nothing to build" in capsys.readouterr().err
    assert written_at(tmp_path / "cache") == before


def test_a_changed_text_is_built_anew_and_what_was_built_stays(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = built(of(corpus))
    before = contents(first.path)
    (corpus / "new.txt").write_text("not yet seen")
    planned = opened_or_planned(of(corpus))
    assert isinstance(planned, PlannedBuild)
    second = open_or_build(of(corpus))
    assert str(second.path) == planned.settings.to != str(first.path)
    assert "the text has changed: source corpus: 1 file added (new.txt)" in capsys.readouterr().err
    assert holds(second, "not yet seen")
    assert contents(first.path) == before
    (corpus / "new.txt").unlink()  # as it was first
    assert built(of(corpus)).path == first.path


def test_the_same_text_written_again_is_the_same(corpus: Path) -> None:
    first = built(of(corpus))
    for path in corpus.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    assert built(of(corpus)).path == first.path


def test_shards_by_another_tokenizer_or_of_another_field_are_others(tmp_path: Path) -> None:
    text = tmp_path / "rows.jsonl"
    text.write_text("".join(f'{{"text": "one {n}", "other": "two {n}"}}\n' for n in range(99)))
    found = [built(of(text)), built(of(text, text_field="other"))]
    found.append(built(of(text, tokenizer="mixtral-v1")))
    assert len({folder.path for folder in found}) == 3
    assert holds(found[0], "one 5")
    assert holds(found[1], "two 5")
    assert found[2].tokenizer.vocab_size == 32_000
    assert [built(of(text)).path, built(of(text, text_field="other")).path] == [
        folder.path for folder in found[:2]
    ]


def test_killed_it_goes_on_in_the_same_folder(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = UnfinishedBuild.keep

    def kept_and_killed(self: UnfinishedBuild, shard: Any) -> None:
        keep(self, shard)
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        UnfinishedBuild.keep = kept_and_killed
        built(of(corpus))

    _, status = os.waitpid(in_child(killed), 0)
    assert status == signal.SIGKILL
    folder = open_or_build(of(corpus))
    assert ": 1 shards are finished" in capsys.readouterr().err
    assert contents(folder.path) == contents(built(of(corpus, cache=tmp_path / "fresh")).path)
    assert [path.name for path in folder.path.parent.iterdir()] == ["1"]


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it should have happened"
        time.sleep(0.02)


def test_of_two_that_need_it_at_once_one_builds_and_the_other_waits(
    corpus: Path, tmp_path: Path
) -> None:
    keep = UnfinishedBuild.keep
    ready, go_on, told = tmp_path / "ready", tmp_path / "go_on", tmp_path / "told"

    def kept_when_allowed(self: UnfinishedBuild, shard: Any) -> None:
        ready.touch()
        until(go_on.exists)
        keep(self, shard)

    def slow() -> None:
        UnfinishedBuild.keep = kept_when_allowed
        built(of(corpus))

    def refused(self: UnfinishedBuild, shard: Any) -> None:
        raise AssertionError("it is built already")

    def other() -> None:
        UnfinishedBuild.keep = refused
        sys.stderr = told.open("w")
        open_or_build(of(corpus))

    first = in_child(slow)
    until(ready.exists)
    second = in_child(other)
    until(lambda: told.exists() and "waiting for the process that builds" in told.read_text())
    go_on.touch()
    assert [os.waitpid(child, 0)[1] for child in (first, second)] == [0, 0]
    places = list((tmp_path / "cache" / "built").glob("*/*"))
    assert places == [built(of(corpus)).path]


def test_damaged_shards_in_the_cache_are_passed_over(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = built(of(corpus))
    next(first.path.glob("*-train-*.tar")).unlink()
    second = open_or_build(of(corpus))
    assert f"passing over {first.path}: " in capsys.readouterr().err
    assert second.path != first.path
    assert second.fingerprint == first.fingerprint
    assert built(of(corpus)).path == second.path


def test_shards_that_lack_what_could_not_be_read_are_not_those_of_all_text(corpus: Path) -> None:
    (corpus / "broken.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"broken\.jsonl.*on_corrupt=skip"):
        built(of(corpus))
    skipping = of(corpus, on_corrupt=OnCorrupt.skip)
    folder = built(skipping)
    assert built(skipping).path == folder.path
    with pytest.raises(DataError, match=r"broken\.jsonl.*on_corrupt=skip"):
        built(of(corpus))
    (corpus / "broken.jsonl").unlink()
    whole = built(of(corpus))
    assert built(skipping).path == whole.path, "nothing was skipped"


def test_a_cache_that_can_not_be_had_names_the_setting(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match=r"data\.dir='.*corpus'.*Not a directory.*data\.cache\.dir"):
        built(of(corpus, cache=tmp_path / "taken"))


def test_text_without_a_document_is_named_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "picture.jpg").write_bytes(b"\xff\xd8\xff\0")
    with pytest.raises(DataError, match=r"no\s+document to train on"):
        built(of(tmp_path / "text"))
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_what_is_text_and_what_is_not(folder: ShardFolder, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    shutil.copytree(folder.path, tmp_path / "copied")
    (tmp_path / "copied" / "index.json").unlink()
    shutil.copytree(corpus, tmp_path / "web")
    (tmp_path / "web" / "index.json").write_text('{"text": "of a page"}')
    assert [path.name for path in sorted(tmp_path.iterdir()) if is_text(path)] == ["corpus", "web"]
    assert is_text(corpus / "0000.txt")
    assert not is_text(tmp_path), "in it are shards"
    assert not any(is_text(where) for where in ("s3://bucket/text", "pipe:cat", "nowhere"))


def test_shards_themselves_are_opened_where_they_are(corpus: Path, tmp_path: Path) -> None:
    shards = build(corpus, tmp_path / "shards")
    assert built(of(shards.path)).path == shards.path
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match=f"data.dir={shards.path}"):
        built(of(tmp_path))
