"""Existing shards match the current text: changes of it are found and reported."""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline import BuildSettings, DataError, DataSettings, open_or_build
from data_pipeline.building.builder import build_shards
from data_pipeline.building.existing import existing_shards
from data_pipeline.building.text_record import TEXT_NAME
from data_pipeline.settings import OnChanged
from tests.data_pipeline.conftest import build, contents, documents_of


def write_again(path: Path, text: str) -> None:
    """Another text at a later time, whatever the resolution of the file system's clock."""
    later = path.stat().st_mtime_ns + 10**9
    path.write_text(text)
    os.utime(path, ns=(later, later))


def same_length(corpus: Path) -> None:
    text = (corpus / "0005.txt").read_text()
    write_again(corpus / "0005.txt", text.replace("w", "v"))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "added": (lambda corpus: (corpus / "new.txt").write_text("new"), r"1 file added \(new\.txt\)"),
    "gone": (lambda corpus: (corpus / "0005.txt").unlink(), r"1 file gone \(0005\.txt\)"),
    "longer": (
        lambda corpus: write_again(corpus / "0005.txt", "other text"),
        r"1 file of another size \(0005\.txt\)",
    ),
    "same length": (same_length, r"other text in 1 file written since \(0005\.txt\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_building_again_after_the_text_changed_says_what_changed(
    change: str, corpus: Path, tmp_path: Path
) -> None:
    built = contents(build(corpus, tmp_path / "to").path)
    work, what = CHANGES[change]
    work(corpus)
    with pytest.raises(DataError, match=rf"another text: source corpus: {what}.*on_changed=rebuil"):
        build(corpus, tmp_path / "to")
    assert contents(tmp_path / "to") == built


@pytest.mark.parametrize("change", CHANGES)
def test_shards_of_changed_text_are_built_anew_where_that_is_asked(
    change: str, corpus: Path, tmp_path: Path
) -> None:
    build(corpus, tmp_path / "to")
    CHANGES[change][0](corpus)
    rebuilt = build(corpus, tmp_path / "to", on_changed=OnChanged.rebuild)
    assert contents(rebuilt.path) == contents(build(corpus, tmp_path / "fresh").path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "fresh", "to"]
    build(corpus, tmp_path / "to")  # and they are the shards of the text as it is


def test_text_that_is_all_gone(corpus: Path, tmp_path: Path) -> None:
    folder = build(corpus, tmp_path / "to").path
    kept = rf".*{folder} holds the shards.*data\.dir={folder} trains"
    shutil.rmtree(corpus)
    with pytest.raises(DataError, match=f"doesn't exist{kept}"):
        build(corpus, tmp_path / "to")
    corpus.mkdir()
    with pytest.raises(DataError, match=f"no document to train on{kept}"):
        build(corpus, tmp_path / "to")


def test_another_folder_of_the_same_relative_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, text in (("here", "one"), ("there", "two")):  # of the same sizes
        (tmp_path / place / "text").mkdir(parents=True)
        for number in range(9):
            (tmp_path / place / "text" / f"{number}.txt").write_text(f"{text} {number}")
    monkeypatch.chdir(tmp_path / "here")
    build(Path("text"), tmp_path / "to")
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(DataError, match=r"other text in 9 files written since \(0\.txt, 1\.txt, "):
        build(Path("text"), tmp_path / "to")


def test_the_same_text_written_again_is_the_same(corpus: Path, tmp_path: Path) -> None:
    built = build(corpus, tmp_path / "to")
    shutil.copytree(corpus, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(corpus)
    (tmp_path / "copy").rename(corpus)
    before = (tmp_path / "to" / TEXT_NAME).read_bytes()
    assert build(corpus, tmp_path / "to").index == built.index
    after = (tmp_path / "to" / TEXT_NAME).read_bytes()
    assert after != before  # so that the text isn't read again next time
    build(corpus, tmp_path / "to")
    assert (tmp_path / "to" / TEXT_NAME).read_bytes() == after


def test_a_run_on_a_corpus_that_changed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = DataSettings(corpus="corpus")
    open_or_build(settings, progress=False)
    (corpus / "new.txt").write_text("not yet seen")
    with pytest.raises(
        DataError, match=r"1 file added \(new.txt\).*data\.on_changed=rebuild"
    ) as error:
        open_or_build(settings, progress=False)
    # As the message says, the old shards can be trained on as they are.
    *_, word = (word for word in shlex.split(str(error.value)) if word.startswith("data.dir="))
    old = open_or_build(DataSettings(dir=word.removeprefix("data.dir=")), progress=False)
    new = open_or_build(DataSettings(corpus="corpus", on_changed=OnChanged.rebuild), progress=False)
    assert "not yet seen" in documents_of(new, "train") + documents_of(new, "validation")
    assert old.fingerprint != new.fingerprint


def test_shards_without_a_record_are_taken_as_they_are(corpus: Path, tmp_path: Path) -> None:
    folder = build(corpus, tmp_path / "to").path
    (folder / TEXT_NAME).unlink()  # as a version without it left them
    shutil.rmtree(corpus)
    assert build(corpus, tmp_path / "to").path == folder


def test_a_copied_folder_needs_no_text(corpus: Path, tmp_path: Path) -> None:
    built = build(corpus, tmp_path / "to")
    built.path.rename(tmp_path / "copied")
    shutil.rmtree(corpus)
    opened = open_or_build(DataSettings(dir=str(tmp_path / "copied")), progress=False)
    assert opened.fingerprint == built.fingerprint


def test_a_damaged_record_is_named(corpus: Path, tmp_path: Path) -> None:
    folder = build(corpus, tmp_path / "to").path
    (folder / TEXT_NAME).write_text(json.dumps({"corpus": {"files": 3}}))
    with pytest.raises(DataError, match=r"text\.json is damaged.*remove it"):
        build(corpus, tmp_path / "to")


def test_a_rebuild_that_was_killed_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(corpus, tmp_path / "to", shard_tokens=2000)
    (corpus / "new.txt").write_text("new")
    settings = BuildSettings(
        corpus=str(corpus),
        to=str(tmp_path / "to"),
        tokenizer="bytes",
        shard_tokens=2000,
        validation_fraction=0.2,
        on_changed=OnChanged.rebuild,
    )
    really_rename = os.rename

    def killed(source: Path, target: Path) -> None:
        if Path(source).name == "shards":
            raise KeyboardInterrupt
        really_rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            build_shards(settings, progress=False)
    assert existing_shards(settings) is None  # between the two renames
    rebuilt = build_shards(settings, progress=False)
    fresh = build(corpus, tmp_path / "fresh", shard_tokens=2000)
    assert contents(rebuilt.path) == contents(fresh.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "fresh", "to"]
