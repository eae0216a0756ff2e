"""Corpora give their documents in one order, and count what they leave out."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import DataError
from data_pipeline.building.builder import build_shards
from data_pipeline.building.training_shards import open_or_build
from data_pipeline.corpora.corpus import kept_documents, open_corpus
from data_pipeline.corpora.raw_documents import LeftOut
from data_pipeline.settings import BuildSettings, DataSettings, OnCorrupt, SourceSettings


def texts_of(
    spec: str | Path, *, on_corrupt: OnCorrupt = OnCorrupt.fail
) -> tuple[list[str], dict[str, int]]:
    left_out = LeftOut()
    raw = open_corpus(str(spec), on_corrupt=on_corrupt).raw_documents()
    return [document.text for document in kept_documents(raw, left_out=left_out)], counts(left_out)


def counts(left_out: LeftOut) -> dict[str, int]:
    """The reasons of which there was one."""
    return {reason: number for reason, number in left_out.num.items() if number}


def save_dataset(folder: Path, shards: list[list[str]]) -> None:
    """Writes texts as `datasets.Dataset.save_to_disk` does (compared with version 5.2.0)."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    schema = pa.schema({"text": pa.string(), "n": pa.int64()})
    names = []
    for number, texts in enumerate(shards):
        names.append(f"data-{number:05d}-of-{len(shards):05d}.arrow")
        table = pa.table({"text": texts, "n": list(range(len(texts)))}, schema=schema)
        with (
            pa.OSFile(str(folder / names[-1]), "wb") as file,
            pa.ipc.new_stream(file, schema) as to,
        ):
            to.write_table(table)
    state: dict[str, object] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "81ae67ba3f255627",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    features = {name: {"dtype": kind, "_type": "Value"} for name, kind in [("text", "string")]}
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def test_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.md", "c.txt", ".hidden", ".git/config"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts_of(tmp_path)[0] == ["a/b/c.md", "a/z.txt", "b.txt", "c.txt"]


def test_files_of_a_folder_are_read_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<title>t</title><p>one</p>")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n{"text": "three"}\n'))
    (tmp_path / "c.md").write_text("# four")
    (tmp_path / "d.html").write_text("<script>nothing</script>")
    texts, left_out = texts_of(tmp_path)
    assert texts == ["one", "two", "three", "# four"]
    assert left_out == dict(empty=1)


def test_left_out_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "d.txt").write_text("")
    texts, left_out = texts_of(tmp_path)
    assert texts == ["same"]
    assert left_out == dict(not_utf8=1, empty=1, duplicate=1)


def test_lone_surrogate_is_counted_as_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "\\ud800"}\n')
    assert texts_of(tmp_path / "x.jsonl") == (["one"], dict(not_utf8=1))


def test_sources_that_share_what_was_seen_have_no_document_in_common(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    seen: set[bytes] = set()
    both = [LeftOut(), LeftOut()]
    texts = []
    for name, left_out in zip(("a.jsonl", "b.jsonl"), both, strict=True):
        raw = open_corpus(str(tmp_path / name), on_corrupt=OnCorrupt.fail).raw_documents()
        texts += [document.text for document in kept_documents(raw, left_out=left_out, seen=seen)]
    assert texts == ["one", "two", "three"]
    assert [counts(left_out) for left_out in both] == [{}, {"duplicate": 1}]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A folder with a line, a member and the rest of a file that can't be read."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\nbad\n{"text": "two"}\n')
    lines = b"".join(b'{"text": "line %d"}\n' % number for number in range(1000))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines)[:-12])
    (folder / "c.tar").write_bytes(b"")
    (folder / "d.txt").write_text("last")
    return folder


def test_corrupt_input_ends_the_reading_with_its_place(damaged: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is not JSON.*on_corrupt=skip"):
        texts_of(damaged)
    with pytest.raises(DataError, match=r"b\.jsonl\.gz is damaged or not whole"):
        texts_of(damaged / "b.jsonl.gz")


def test_corrupt_input_is_passed_over_and_counted(damaged: Path) -> None:
    texts, left_out = texts_of(damaged, on_corrupt=OnCorrupt.skip)
    lines = texts[2:-1]
    assert [*texts[:2], texts[-1]] == ["one", "two", "last"]
    assert lines == [f"line {number}" for number in range(len(lines))]  # what came before stays
    assert left_out == dict(corrupt=3)


def test_missing_library_is_never_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install"):
        texts_of(tmp_path, on_corrupt=OnCorrupt.skip)


def test_saved_dataset_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    save_dataset(tmp_path / "set", [["one", "two"], ["three"]])
    (tmp_path / "set" / "cache-0.arrow").write_bytes(b"left by a map() of the data set")
    assert texts_of(tmp_path / "set") == (["one", "two", "three"], {})


def test_saved_dataset_in_splits_is_read_split_by_split(tmp_path: Path) -> None:
    for split in ("train", "test", "old"):
        save_dataset(tmp_path / "set" / split, [[f"a {split} text"]])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts_of(tmp_path / "set") == (["a train text", "a test text"], {})


def test_saved_dataset_in_a_folder_of_text_is_one_of_its_documents(tmp_path: Path) -> None:
    save_dataset(tmp_path / "b", [["from the data set"]])
    (tmp_path / "b" / "cache").mkdir()
    (tmp_path / "b" / "cache" / "x.txt").write_text("not of the data set")
    (tmp_path / "a.txt").write_text("before")
    (tmp_path / "c.txt").write_text("after")
    assert texts_of(tmp_path)[0] == ["before", "from the data set", "after"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("state.json", lambda saved: saved["_data_files"][0].update(filename="../x"), "'../x'"),
        ("state.json", lambda saved: saved["_data_files"][0].update(filename="gone"), "'gone'"),
        ("state.json", lambda saved: saved.pop("_data_files"), "is not what `datasets` writes"),
        (
            "state.json",
            lambda saved: saved.update(_indices_data_files=[{"filename": "i.arrow"}]),
            "save it again",
        ),
    ],
)
def test_saved_dataset_that_lies_is_named(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    (tmp_path / "x").write_text("not of the data set")
    save_dataset(tmp_path / "set", [["one"]])
    (tmp_path / "set" / "i.arrow").write_text("")
    saved = json.loads((tmp_path / "set" / name).read_text())
    change(saved)
    (tmp_path / "set" / name).write_text(json.dumps(saved))
    with pytest.raises(DataError, match=message) as caught:
        open_corpus(str(tmp_path / "set"), on_corrupt=OnCorrupt.skip)
    assert str(tmp_path / "set" / name) in str(caught.value)


def test_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    with pytest.raises(DataError, match="has no document to train on"):
        open_corpus(str(tmp_path), on_corrupt=OnCorrupt.fail)


def test_pipe_is_refused_with_the_reason() -> None:
    with pytest.raises(DataError, match=r"pipe:echo hello.*would run a shell command"):
        open_corpus("pipe:echo hello", on_corrupt=OnCorrupt.fail)


def test_corpus_on_a_server_is_refused_with_a_way_out_and_without_its_secrets() -> None:
    with pytest.raises(DataError, match=r"s3://bucket/text' is on a server.*fetch it") as caught:
        open_corpus("s3://key:secret@bucket/text", on_corrupt=OnCorrupt.fail)
    assert "secret" not in str(caught.value)


def test_corpus_that_is_a_link_to_nothing_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("annex")
    with pytest.raises(DataError, match=r"is a link to annex, which isn't there"):
        open_corpus(str(tmp_path / "x"), on_corrupt=OnCorrupt.fail)


def test_missing_corpus_is_named_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"/no/such/place.*stdlib"):
        open_corpus("/no/such/place", on_corrupt=OnCorrupt.fail)


def test_standard_library_has_sources_and_no_tests() -> None:
    corpus = open_corpus("stdlib", on_corrupt=OnCorrupt.fail)
    names = [file.name for file in corpus.files]
    assert "argparse.py" in names
    assert not [name for name in names if "/test/" in name or "/tests/" in name]
    assert not [name for name in names if name.startswith(("test/", "site-packages/"))]
    assert 8e6 < corpus.num_bytes < 30e6


def test_several_texts_in_one_setting_are_told_to_be_several_sources() -> None:
    with pytest.raises(DataError, match=r"sources\.a\.corpus=a sources\.b\.corpus=text/b in place"):
        open_corpus("a,text/b", on_corrupt=OnCorrupt.fail)


def test_texts_of_one_name_are_proposed_as_sources_of_names_that_are_free() -> None:
    proposed = r"sources\.data-2\.corpus=a/data sources\.data-3\.corpus='b c/data' in place of "
    with pytest.raises(DataError, match=rf"^sources\.data\.corpus='.*{proposed}sources\.data"):
        open_corpus(
            "a/data,b c/data",
            on_corrupt=OnCorrupt.fail,
            setting="sources.data.corpus",
            sources=["data"],
        )


def test_corpus_of_links_that_lead_nowhere_is_told_the_reason_and_the_way_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "x").symlink_to("annex")
    message = r"1 unreadable \(x\); x is a link to annex, .*fetch what it stands for"
    with pytest.raises(DataError, match=message):
        open_corpus(str(tmp_path), on_corrupt=OnCorrupt.fail)


def test_setting_of_a_corpus_is_named_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^sources\.a\.corpus='nowhere' doesn't exist"):
        build_shards(
            BuildSettings(
                to="to", tokenizer="bytes", sources={"a": SourceSettings(corpus="nowhere")}
            )
        )
    with pytest.raises(DataError, match=r"^data\.corpus='nowhere' doesn't exist"):
        open_or_build(DataSettings(corpus="nowhere"))
