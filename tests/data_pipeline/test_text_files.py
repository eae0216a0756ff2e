"""Each format of a file gives its documents, and damage gives an error that says where."""

import gzip
import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import pytest

from data_pipeline import DataError
from data_pipeline.raw_documents import Reason, Text, Unread
from data_pipeline.text_files import read_documents

zstandard = pytest.importorskip("zstandard")

TEXTS = [f"document {number}: é € " + "word " * number for number in range(200)]


class Touch:
    """A pickle that shows that it was unpickled: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def texts_and_errors(path: Path) -> tuple[list[str], list[str]]:
    documents = list(read_documents(path, where=str(path)))
    texts = [document.text for document in documents if isinstance(document, Text)]
    unread = [document for document in documents if isinstance(document, Unread)]
    return texts, [f"{document.where} {document.why}" for document in unread]


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


def packed(content: bytes, name: str) -> bytes:
    if name.endswith((".gz", ".tgz")):
        half = len(content) // 2  # two members, as bgzip and concatenation make them
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if name.endswith(".zst"):
        compress = zstandard.ZstdCompressor().compress
        half = len(content) // 2
        return compress(content[:half]) + compress(content[half:])
    return content


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("x.jsonl", json_lines(TEXTS), TEXTS),
        ("X.NDJSON", b"\n" + json_lines(["a", ""]) + b' \n{"text": "c"}', ["a", "", "c"]),
        ("x.txt", "\ufeffa\r\nb\x00".encode(), ["\ufeffa\r\nb\x00"]),
        ("x.md", b"# A *title*\n", ["# A *title*\n"]),
        ("Makefile", b"all:\n", ["all:\n"]),
        ("x.json", b'{"text": 1}', ['{"text": 1}']),
        ("x.html", b"<p>a<p>b", ["a\nb"]),
        ("x.xhtml", b"<p>a</p><p>b</p>", ["a\nb"]),
        ("x.tar", tar_of({"1.txt": b"a", "2.txt": b"b"}), ["a", "b"]),
    ],
)
def test_name_says_how_a_file_is_read(
    tmp_path: Path, name: str, content: bytes, texts: list[str], suffix: str
) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(packed(content, name + suffix))
    assert texts_and_errors(path) == (texts, [])


@pytest.mark.parametrize("name", ["x.txt", "x.html", "x.jsonl"])
def test_what_is_not_utf8_is_an_error_of_that_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "\xe9t\xe9"}')
    (unread,) = read_documents(tmp_path / name, where=name)
    assert isinstance(unread, Unread)
    assert unread.reason is Reason.not_utf8


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "is not JSON"),
        (b'{"text": "cut', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"txt": "a"}', "has no 'text' field that holds a string"),
        (b'{"text": null}', "has no 'text' field that holds a string"),
        (b"[1]", "has no 'text' field that holds a string"),
    ],
)
def test_bad_json_line_is_named_and_the_others_are_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    texts, (error,) = texts_and_errors(path)
    assert texts == ["a", "c"]
    assert f"{path}, line 2 {reason}" in error


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.tar.gz", "x.tar.zst", "x.tar"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.8, 0.999])
def test_cut_file_ends_with_an_error(tmp_path: Path, name: str, share: float) -> None:
    members = {f"{number}.txt": text.encode() for number, text in enumerate(TEXTS)}
    whole = packed(json_lines(TEXTS) if "jsonl" in name else tar_of(members), name)
    path = tmp_path / name
    path.write_bytes(whole[: int(share * len(whole))])
    texts, errors = texts_and_errors(path)
    if name == "x.tar" and share == 0.999:  # cut in the padding that follows the end
        assert (texts, errors) == (TEXTS, [])
        return
    assert texts == TEXTS[: len(texts)]
    assert len(texts) < len(TEXTS) or share > 0.99
    (error,) = errors
    assert f"{path} is damaged or not whole" in error


def test_cut_text_is_no_document(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(os.urandom(100_000).hex().encode())[:-9])
    assert texts_and_errors(path)[0] == []


@pytest.mark.parametrize("place", [0, 100, 512, 1024 + 150])
def test_damaged_tar_header_is_no_end_of_the_tar(tmp_path: Path, place: int) -> None:
    content = bytearray(tar_of({"1.txt": b"one", "2.txt": b"two"}))
    content[place] ^= 1
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    texts, errors = texts_and_errors(path)
    if place == 512:  # in the text itself, which a tar has no checksum of
        assert (texts, errors) == (["nne", "two"], [])
    else:
        assert texts == (["one"] if place > 512 else [])
        assert len(errors) == 1
        assert str(path) in errors[0]


def test_tars_that_were_joined_are_not_read_by_half(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"1.txt": b"one"}) + tar_of({"2.txt": b"two"}))
    texts, (error,) = texts_and_errors(path)
    assert texts == ["one"]
    assert "follows the end of the tar" in error


def test_text_members_of_a_webdataset_are_documents(tmp_path: Path) -> None:
    members = {
        "a/000.txt": "é".encode(),
        "a/000.jpg": b"\xff\xd8",
        "a/000.json": b'{"width": 3}',
        "a/001.caption.txt": b"caption",
        "a/001.json": b'{"text": "from json", "url": ""}',
        "a/002.html": b"<p>from html",
        "a/003.jsonl": json_lines(["l1", "l2"]),
        "a/004.MD": b"# md",
        "a/005.cls": b"7",
        "a/006.tar": b"",
        "a/007.txt.gz": gzip.compress(b"packed once more"),
        "__" + "long name " * 30 + ".txt": b"long",
    }
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(members))
    assert texts_and_errors(path) == (
        ["é", "caption", "from json", "from html", "l1", "l2", "# md", "long"],
        [],
    )


def test_bad_members_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(
        tar_of({"1.json": b"{", "2.jsonl": b'{"text": "a"}\n{}\n', "3.txt": b"\xff", "4.txt": b"b"})
    )
    texts, errors = texts_and_errors(path)
    assert texts == ["a", "b"]
    assert f"{path}, member '1.json' is not JSON" in errors[0]
    assert f"{path}, member '2.jsonl', line 2 has no 'text'" in errors[1]
    assert "utf-8" in errors[2]


@pytest.mark.parametrize(
    "name", ["../a.txt", "a/../../b.txt", "/etc/a.txt", "..", "a/..", "../picture.jpg"]
)
def test_member_whose_name_leads_out_of_the_tar_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(tar_of({"1.txt": b"one", name: b"evil", "2.txt": b"two"}))
    texts, (error,) = texts_and_errors(path)
    assert texts == ["one", "two"]
    assert f"{path}, member {name!r} is refused" in error
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "pth", "pt", "PKL", "pkl.gz"])
def test_pickled_member_is_refused_and_not_unpickled(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "x.tar"
    content = pickle.dumps(Touch(tmp_path / "touched"))
    path.write_bytes(tar_of({"1.txt": b"one", f"1.{suffix}": content}))
    texts, (error,) = texts_and_errors(path)
    assert texts == ["one"]
    assert "is refused: a pickle can run code" in error
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        entry = tarfile.TarInfo("a/1.txt")
        entry.type = kind
        entry.linkname = str(tmp_path / "secret.txt")
        tar.addfile(entry)
    texts, (error,) = texts_and_errors(path)
    assert texts == []
    assert "member 'a/1.txt' is refused" in error


def test_member_that_lies_about_its_size_takes_no_memory(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("1.txt")
    entry.size = 2**50
    path = tmp_path / "x.tar"
    path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + b"short")
    texts, (error,) = texts_and_errors(path)
    assert texts == []
    assert f"{path} is damaged or not whole" in error


def test_member_of_a_negative_size_does_not_lead_back(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("2.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"1.txt": b"one"})[:1024] + header + bytes(1024))
    texts, (error,) = texts_and_errors(path)
    assert texts == ["one"]
    assert f"{path} is damaged or not whole: a member's size leads back" in error


def test_compressed_table_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "x.parquet.gz").write_bytes(b"")
    _, (error,) = texts_and_errors(tmp_path / "x.parquet.gz")
    assert "unpack it to a .parquet file" in error


def test_missing_zstandard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(packed(json_lines(["a"]), path.name))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"x\.jsonl\.zst.*pip install 'moetrain\[corpora\]'"):
        list(read_documents(path, where=path.name))
