"""A place without shards: the message has the command for just this place, and it works."""

import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

import data_pipeline.build
from data_pipeline import BuildSettings, DataError, ShardFolder
from data_pipeline.commands.command import run_command
from tests.data_pipeline.conftest import build, write_corpus


def message(place: Path) -> str:
    with pytest.raises(DataError) as error:
        ShardFolder.open(place)
    return str(error.value)


def run_as_printed(text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the command at the end of a message; returns the data.dir that the message gives."""
    words = shlex.split(text)
    start = words.index("python")
    assert words[start : start + 3] == ["python", "-m", "data_pipeline.build"]
    monkeypatch.setattr(sys, "argv", ["data_pipeline.build", *words[start + 3 :]])
    GlobalHydra.instance().clear()
    run_command(
        data_pipeline.build.build,
        settings_type=BuildSettings,
        module="data_pipeline.build",
        about="",
    )
    (given,) = (word for word in words if word.startswith("data.dir="))
    return given.removeprefix("data.dir=")


@pytest.mark.parametrize("name", ["text", "my text, 2nd"])
def test_a_folder_of_plain_text_gives_the_command_for_this_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_corpus(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time the first one's place is taken
        folder = ShardFolder.open(run_as_printed(message(tmp_path / name), monkeypatch))
        (source,) = folder.index.sources
        assert sum(split.num_documents for split in source.splits.values()) == len(texts)
    assert len(list((tmp_path / "data").iterdir())) == 2


def test_a_file_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "one {n}"}}\n' for n in range(50)))
    monkeypatch.chdir(tmp_path)
    folder = ShardFolder.open(run_as_printed(message(tmp_path / "a.jsonl"), monkeypatch))
    assert folder.tokenizer.name == "bytes"


def test_shards_without_their_index_are_no_text(folder: ShardFolder) -> None:
    (folder.path / "index.json").unlink()
    found = message(folder.path)
    assert "shards are in it, and no index.json of them" in found
    assert f"corpus={folder.path}" not in found


def test_the_folder_above_shards_names_them(folder: ShardFolder, tmp_path: Path) -> None:
    assert f"data.dir={folder.path}" in message(tmp_path)
    build(tmp_path / "corpus", tmp_path / "other")
    assert f"data.dir={tmp_path / 'other'} (1 more are there)" in message(tmp_path)


@pytest.mark.parametrize("make", [True, False])
def test_where_nothing_is_the_command_is_for_any_text(make: bool, tmp_path: Path) -> None:
    if make:
        (tmp_path / "nothing").mkdir()
    found = message(tmp_path / "nothing")
    assert ("nothing is in it" if make else "there is no such folder") in found
    assert "corpus=stdlib tokenizer=bytes to=FOLDER" in found
