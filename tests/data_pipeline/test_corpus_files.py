"""Which files of a folder are read, through links too; what isn't is counted or refused."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline import DataError
from data_pipeline.corpora.corpus import kept_documents, open_corpus
from data_pipeline.corpora.corpus_files import found_files
from data_pipeline.corpora.raw_documents import LeftOut
from data_pipeline.settings import OnCorrupt
from tests.data_pipeline.conftest import build, contents


def read(folder: Path, *, on_corrupt: OnCorrupt = OnCorrupt.fail) -> tuple[list[str], LeftOut]:
    left_out = LeftOut()
    raw = open_corpus(str(folder), on_corrupt=on_corrupt).raw_documents()
    return [document.text for document in kept_documents(raw, left_out=left_out)], left_out


def write(root: Path, *names: str) -> Path:
    """Files that hold their own names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def let_others_in(path: Path) -> None:
    """Lets other users into a folder of a test: pytest makes those above it for one alone."""
    for folder in (path, *path.parents):
        if folder == Path(tempfile.gettempdir()):
            return
        folder.chmod(0o755)


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """As a user who may not list a folder: root may do all, and has to be somebody else."""
    path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        path.chmod(0o755)


def test_files_are_listed_in_the_order_of_their_paths_with_size_and_time(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "a/z.txt", "a-b/c.txt")
    files = open_corpus(str(tmp_path), on_corrupt=OnCorrupt.fail).files
    assert [file.name for file in files] == ["a-b/c.txt", "a/z.txt", "b.txt"]
    assert files[1].size == len("a/z.txt")
    assert files[1].mtime_ns == (tmp_path / "a" / "z.txt").stat().st_mtime_ns


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.txt", "deep/2.txt")
    corpus = write(tmp_path / "corpus", "3.txt")
    (corpus / "sub").symlink_to(tmp_path / "elsewhere")
    (corpus / "4.txt").symlink_to(write(tmp_path, "four") / "four")
    texts, left_out = read(corpus)
    assert texts == ["3.txt", "four", "1.txt", "deep/2.txt"]
    assert not any(left_out.num.values())


def test_loops_of_links_are_read_once_and_named(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", "a/1.txt", "b/2.txt")
    (corpus / "a" / "up").symlink_to("..")
    (corpus / "a" / "other").symlink_to(tmp_path / "corpus" / "b")
    (corpus / "b" / "self").symlink_to(".")
    texts, left_out = read(corpus)
    assert texts == ["a/1.txt", "b/2.txt"]
    assert left_out.num["read_already"] == 3
    assert left_out.examples["read_already"] == ["a/other", "a/up", "b/self"]


def test_folder_that_two_links_lead_to_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.txt")
    corpus = write(tmp_path / "corpus", "0.txt")
    for name in ("z", "y"):
        (corpus / name).symlink_to(tmp_path / "elsewhere")
    found = found_files(corpus)
    assert [file.name for file in found.files] == ["0.txt", "y/1.txt"]
    (unread,) = found.passed_over
    assert (unread.where, unread.why) == ("z", "leads to y, which is read")


@pytest.mark.parametrize("target", ["../.git/annex/objects/x", "lost.txt"])
def test_link_that_leads_nowhere_is_refused_or_counted(tmp_path: Path, target: str) -> None:
    corpus = write(tmp_path / "corpus", "1.txt")
    (corpus / "lost.txt").symlink_to(target)  # the second one to itself
    with pytest.raises(
        DataError, match=rf"lost\.txt is a link to {target}.*fetch.*on_corrupt=skip"
    ):
        read(corpus)
    texts, left_out = read(corpus, on_corrupt=OnCorrupt.skip)
    assert texts == ["1.txt"]
    assert left_out.num["unreadable"] == 1
    assert left_out.examples["unreadable"] == ["lost.txt"]


def test_folder_that_may_not_be_listed_is_refused_or_counted(tmp_path: Path) -> None:
    let_others_in(tmp_path)
    corpus = write(tmp_path / "corpus", "1.txt", "private/2.txt")
    with without_rights(corpus / "private"):
        with pytest.raises(DataError, match=r"private can't be listed.*on_corrupt=skip"):
            read(corpus)
        texts, left_out = read(corpus, on_corrupt=OnCorrupt.skip)
    assert texts == ["1.txt"]
    assert left_out.examples["unreadable"] == ["private"]


@pytest.mark.parametrize("name", ["2.txt", "2.jsonl", "2.parquet", "2.tar"])
def test_file_that_may_not_be_read_is_refused_or_counted(tmp_path: Path, name: str) -> None:
    let_others_in(tmp_path)
    corpus = write(tmp_path / "corpus", "1.txt", name)
    with without_rights(corpus / name):
        with pytest.raises(DataError, match=rf"{name} can't be read.*on_corrupt=skip"):
            read(corpus)
        texts, left_out = read(corpus, on_corrupt=OnCorrupt.skip)
    assert texts == ["1.txt"]
    assert left_out.examples["unreadable"] == [name]


@pytest.mark.parametrize("on_corrupt", list(OnCorrupt))
def test_disk_that_fails_while_it_is_listed_ends_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_corrupt: OnCorrupt
) -> None:
    corpus = write(tmp_path / "corpus", "1.txt", "bad/2.txt")
    listed = os.scandir

    def scandir(folder: Path) -> object:
        if Path(folder).name == "bad":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=r"Input/output error.*bad"):
        read(corpus, on_corrupt=on_corrupt)


def test_pipe_in_a_folder_is_counted_and_not_opened(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", "1.txt")
    os.mkfifo(corpus / "pipe")
    texts, left_out = read(corpus)
    assert texts == ["1.txt"]
    assert left_out.examples["not_a_file"] == ["pipe"]


def test_hidden_names_are_counted_and_the_first_few_are_named(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", "1.txt", *(f".{n}" for n in range(5)), ".git/config")
    texts, left_out = read(corpus)
    assert texts == ["1.txt"]
    assert left_out.num["hidden"] == 6  # a folder counts as one
    assert left_out.examples["hidden"] == [".0", ".1", ".2"]


def test_output_folder_inside_the_corpus_is_no_part_of_it(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", *(f"{number}.txt" for number in range(20)))
    folder = build(corpus, corpus / "data" / "x")
    apart = build(corpus, tmp_path / "y")
    assert not any(folder.source("corpus").num_left_out.values())
    # The second build met the shards of the first, which are no text.
    assert apart.source("corpus").left_out_examples["output"] == ("data/x",)
    tars = [
        {name: content for name, content in contents(place).items() if name != "index.json"}
        for place in (folder.path, apart.path)
    ]
    assert tars[0] == tars[1]


def test_run_inside_the_corpus_is_no_part_of_it(tmp_path: Path) -> None:
    run = [f"runs/a/{name}" for name in ("config.yaml", "events.jsonl", "metrics.jsonl")]
    corpus = write(tmp_path / "corpus", "1.txt", "b/config.yaml", *run)
    texts, left_out = read(corpus)
    assert texts == ["1.txt", "b/config.yaml"]
    assert left_out.examples == {"output": ["runs/a"]}


def test_folder_of_shards_is_refused_as_a_corpus(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", *(f"{number}.txt" for number in range(20)))
    build(corpus, tmp_path / "shards")
    with pytest.raises(DataError, match=r"holds shards that were built.*data\.dir="):
        open_corpus(str(tmp_path / "shards"), on_corrupt=OnCorrupt.fail)
