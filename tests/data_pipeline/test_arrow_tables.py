"""The `text` column of Parquet and Arrow files, whole or damaged."""

import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import DataError
from data_pipeline.corpora.arrow_tables import table_texts
from data_pipeline.corpora.raw_documents import Reason, Text, Unread
from data_pipeline.corpora.text_files import read_documents

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"document {number}: é €" for number in range(1000)]


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Writes a table in pieces of 100 rows, as Parquet or as an Arrow stream."""
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=100, write_page_checksum=True)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=100)


def documents_of(path: Path, *, field: str = "text") -> list[str | Unread]:
    """The texts of a table, and what stands in the place of one."""
    raw = table_texts(path, where=str(path), field=field)
    return [document.text if isinstance(document, Text) else document for document in raw]


@pytest.fixture(params=["x.parquet", "x.arrow"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_rows_come_in_order(path: Path, kind: Any) -> None:
    write_table(path, {"id": list(range(1000)), "text": pa.array(TEXTS).cast(kind)})
    assert documents_of(path) == TEXTS


def test_row_without_text_is_named(path: Path) -> None:
    write_table(path, {"text": ["one", None, "three"]})
    one, error, three = documents_of(path)
    assert (one, three) == ("one", "three")
    assert isinstance(error, Unread)
    assert error.reason is Reason.corrupt
    assert f"{path}, row 2" in f"{error.where} {error.why}"


def test_row_that_is_not_utf8_spoils_no_other(path: Path) -> None:
    values = pa.array([b"one", b"\xe9t\xe9", b"three"])
    text = pa.StringArray.from_buffers(3, values.buffers()[1], values.buffers()[2])
    write_table(path, {"text": text})
    one, error, three = documents_of(path)
    assert (one, three) == ("one", "three")
    assert isinstance(error, Unread)
    assert error.reason is Reason.not_utf8


@pytest.mark.parametrize("columns", [{"txt": ["a"]}, {"text": [1]}])
def test_table_without_a_text_column_is_named(path: Path, columns: dict[str, Any]) -> None:
    write_table(path, columns)
    (error,) = documents_of(path)
    assert isinstance(error, Unread)
    assert error.reason is Reason.corrupt
    assert f"{path} has no column 'text'" in f"{error.where} {error.why}"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.999])
def test_cut_table_ends_with_an_error(path: Path, share: float) -> None:
    write_table(path, {"text": TEXTS})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    *texts, error = documents_of(path)
    assert texts == TEXTS[: len(texts)]
    assert isinstance(error, Unread)
    assert error.reason is Reason.corrupt
    assert f"{path} is damaged" in f"{error.where} {error.why}"


def test_stream_cut_between_its_batches_ends_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    write_table(path, {"text": TEXTS})
    path.write_bytes(path.read_bytes()[:-8])  # the mark of the end
    *texts, error = documents_of(path)
    assert texts == TEXTS
    assert isinstance(error, Unread)
    assert error.reason is Reason.corrupt


def test_stream_that_ends_before_its_file_does_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    write_table(path, {"text": TEXTS})
    path.write_bytes(path.read_bytes() * 2)
    *texts, error = documents_of(path)
    assert texts == TEXTS
    assert isinstance(error, Unread)
    assert error.reason is Reason.corrupt


def test_offsets_that_lead_out_of_a_stream_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    write_table(path, {"text": ["one", "two", "three"]})
    content = path.read_bytes()
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 3, 6, 11))
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f" * 2))
    (error,) = documents_of(path)
    assert isinstance(error, Unread)
    assert error.reason is Reason.corrupt


def test_flipped_byte_of_a_parquet_page_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_table(path, {"text": TEXTS})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    *texts, error = documents_of(path)
    assert texts == TEXTS[: len(texts)]
    assert isinstance(error, Unread)
    assert error.reason is Reason.corrupt


def test_missing_rows_of_a_parquet_file_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_table(path, {"text": TEXTS})
    content = path.read_bytes()
    num_rows = b"\x16\xd0\x0f"  # 1000 in the footer, as Thrift writes it: field, zigzag varint
    assert content.count(num_rows) == 1
    path.write_bytes(content.replace(num_rows, b"\x16\xd2\x0f"))
    *texts, error = documents_of(path)
    assert texts == TEXTS
    assert isinstance(error, Unread)
    assert "1 rows are missing" in f"{error.where} {error.why}"


def test_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'moetrain\[corpora\]'"):
        list(documents_of(tmp_path / "x.parquet"))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_arrow_file_of_other_writers_is_read(tmp_path: Path, compression: str | None) -> None:
    path = tmp_path / "x.feather"
    table = pa.table({"text": TEXTS})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, table.schema, options=options) as to,
    ):
        to.write_table(table, max_chunksize=100)
    assert documents_of(path) == TEXTS
    path.write_bytes(path.read_bytes()[:-20])
    (error,) = documents_of(path)
    assert isinstance(error, Unread)
    assert error.reason is Reason.corrupt


def test_table_in_a_tar_is_read_as_in_a_folder(path: Path) -> None:
    write_table(path, {"text": TEXTS})
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        tar.add(path, path.name)
    raw = read_documents(path.with_suffix(".tar"), where="x.tar", field="text")
    assert [document.text for document in raw if isinstance(document, Text)] == TEXTS
