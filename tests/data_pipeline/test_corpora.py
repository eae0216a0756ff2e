"""Corpora give their documents in one order, and count what they leave out."""

import gzip
import json
from pathlib import Path

import pytest

from data_pipeline import DataError
from data_pipeline.corpora import LeftOut, kept_documents, open_corpus


def texts_of(spec: str | Path) -> tuple[list[str], LeftOut]:
    left_out = LeftOut()
    raw = open_corpus(str(spec)).raw_documents()
    return [document.text for document in kept_documents(raw, left_out=left_out)], left_out


def test_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.md", "c.txt", ".hidden", ".git/config"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts_of(tmp_path)[0] == ["a/b/c.md", "a/z.txt", "b.txt", "c.txt"]


def test_left_out_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "d.txt").write_text("")
    texts, left_out = texts_of(tmp_path)
    assert texts == ["same"]
    assert left_out == LeftOut(not_utf8=1, empty=1, duplicate=1)


def test_text_is_not_changed(tmp_path: Path) -> None:
    content = "\ufeffa\r\nb\rc\x00\n".encode()
    (tmp_path / "a.txt").write_bytes(content)
    assert texts_of(tmp_path / "a.txt")[0] == [content.decode()]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in ("one", "zwei é", "\ud800")]
    content = ("\n".join([*lines, ""]) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    texts, left_out = texts_of(tmp_path / name)
    assert texts == ["one", "zwei é"]
    assert left_out.not_utf8 == 1  # the lone surrogate


@pytest.mark.parametrize("line", ["not json", '{"txt": "a"}', '{"text": 3}', "[1]"])
def test_bad_json_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl, line 2"):
        texts_of(tmp_path / "x.jsonl")


def test_truncated_gzip_is_named(tmp_path: Path) -> None:
    content = gzip.compress(b'{"text": "' + bytes(range(97, 120)) * 50 + b'"}\n')
    (tmp_path / "x.jsonl.gz").write_bytes(content[:-12])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz"):
        texts_of(tmp_path / "x.jsonl.gz")


def test_missing_corpus_is_named_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"/no/such/place.*stdlib"):
        open_corpus("/no/such/place")


def test_standard_library_has_sources_and_no_tests() -> None:
    corpus = open_corpus("stdlib")
    names = corpus.names  # type: ignore[attr-defined]
    assert "argparse.py" in names
    assert not [name for name in names if "/test/" in name or "/tests/" in name]
    assert not [name for name in names if name.startswith(("test/", "site-packages/"))]
    assert 8e6 < corpus.num_bytes < 30e6
