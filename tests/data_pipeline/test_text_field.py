"""The field of JSON objects and tables that holds the text is a setting, also of each source."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import BuildSettings, DataError, DataSettings, build_shards, open_or_build
from data_pipeline.corpora.corpus import open_corpus
from data_pipeline.corpora.raw_documents import Text
from data_pipeline.settings import OnCorrupt, SourceSettings, resolved_dir
from tests.data_pipeline.conftest import build, documents_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS: list[dict[str, Any]] = [
    {
        "id": number,
        "content": f"code {number}",
        "meta": {"raw": {"text": f"raw {number}"}},
        "a.b": f"dotted {number}",
    }
    for number in range(40)
]


def write_rows(folder: Path, kind: str) -> Path:
    """The rows as a file of a kind in a folder of its own."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "jsonl":
        (folder / "x.jsonl").write_text(lines)
    elif kind == "json.gz":
        (folder / "x.json.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        (folder / "x.json").write_text(json.dumps(ROWS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "x.parquet")
    else:
        table = pa.Table.from_pylist(ROWS)
        with (
            pa.OSFile(str(folder / "x.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "json.gz", "json", "parquet", "arrow"])
@pytest.mark.parametrize(
    ("field", "first"),
    [("content", "code 0"), ("meta.raw.text", "raw 0"), ("a.b", "dotted 0")],
)
def test_text_is_read_from_the_field_that_is_named(
    tmp_path: Path, kind: str, field: str, first: str
) -> None:
    corpus = write_rows(tmp_path / "corpus", kind)
    documents = list(
        open_corpus(str(corpus), on_corrupt=OnCorrupt.fail, text_field=field).raw_documents()
    )
    assert len(documents) == len(ROWS)
    assert isinstance(documents[0], Text)
    assert documents[0].text == first


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
@pytest.mark.parametrize("field", ["text", "meta", "meta.raw", "meta.text", "id", "content.text"])
def test_missing_field_names_those_there_are_and_the_setting(
    tmp_path: Path, kind: str, field: str
) -> None:
    corpus = write_rows(tmp_path / "corpus", kind)
    number = "id (a number)" if "json" in kind else "id (int64)"
    with pytest.raises(DataError) as caught:
        build(corpus, tmp_path / "to", text_field=field)
    assert repr(field) in str(caught.value)
    assert f"but {number}, content, meta.raw.text, a.b; name the field by text_field=" in str(
        caught.value
    )
    for setting in ("text_field=", "sources.NAME.text_field=", "data.text_field="):
        assert setting in str(caught.value)
    assert not (tmp_path / "to").exists()


def test_null_inside_a_struct_is_a_row_without_text(tmp_path: Path) -> None:
    rows = [{"a": {"b": "one"}}, {"a": None}, {"a": {"b": None}}, {"a": {"b": "four"}}]
    kind = pa.schema({"a": pa.struct({"b": pa.string()})})
    pq.write_table(pa.Table.from_pylist(rows, schema=kind), tmp_path / "x.parquet")
    corpus = open_corpus(str(tmp_path), on_corrupt=OnCorrupt.skip, text_field="a.b")
    found = [getattr(document, "text", None) for document in corpus.raw_documents()]
    assert found == ["one", None, None, "four"]


def test_each_source_may_have_a_field_of_its_own(tmp_path: Path) -> None:
    code, web = (write_rows(tmp_path / name, "jsonl") for name in ("code", "web"))
    sources = {
        "code": SourceSettings(corpus=str(code)),
        "web": SourceSettings(corpus=str(web), text_field="meta.raw.text"),
    }
    folder = build_shards(
        BuildSettings(
            to=str(tmp_path / "to"), tokenizer="bytes", text_field="content", sources=sources
        ),
        progress=False,
    )
    assert all(text.startswith("code") for text in documents_of(folder, "train", source="code"))
    assert all(text.startswith("raw") for text in documents_of(folder, "train", source="web"))
    build_of = folder.index.build.sources
    assert [source.text_field for source in build_of.values()] == ["content", "meta.raw.text"]


def test_shards_of_another_field_are_not_taken_for_the_same(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "corpus", "jsonl")
    build(corpus, tmp_path / "to", text_field="content")
    assert documents_of(build(corpus, tmp_path / "to", text_field="content"), "train")
    with pytest.raises(DataError, match=r"'text_field': 'content'.*not.*'meta\.raw\.text'"):
        build(corpus, tmp_path / "to", text_field="meta.raw.text")


def test_trainer_builds_each_field_into_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows", "jsonl")
    names = []
    for field in ("content", "meta.raw.text"):
        settings = DataSettings(corpus="rows", text_field=field)
        folder = open_or_build(settings, progress=False)
        assert folder.source("rows").splits["train"].num_documents > 30
        names.append(Path(resolved_dir(settings)).name)
    assert names == ["rows-content-bytes", "rows-meta-raw-text-bytes"]
    assert Path(resolved_dir(DataSettings(corpus="rows"))).name == "rows-bytes"


def test_trainer_tells_what_its_build_left_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (write_rows(tmp_path / "rows", "jsonl") / "x.txt").write_text(" ")
    settings = DataSettings(corpus="rows", text_field="content")
    for expected in (True, False):
        open_or_build(settings)
        assert (
            "rows: left out: 0 not utf8, 1 empty (x.txt)" in capsys.readouterr().err
        ) == expected


def test_empty_field_is_refused() -> None:
    with pytest.raises(ValueError, match="is empty: name the field"):
        BuildSettings(to="to", tokenizer="bytes", corpus="x", text_field=" ")
