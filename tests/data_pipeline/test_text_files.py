"""Each format of a file gives its documents, and damage gives an error that says where."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline import DataError
from data_pipeline.corpora import json_documents
from data_pipeline.corpora.corpus import kept_documents, open_corpus
from data_pipeline.corpora.raw_documents import LeftOut, Reason, Text, Unread
from data_pipeline.corpora.text_files import read_documents
from data_pipeline.settings import OnCorrupt

zstandard = pytest.importorskip("zstandard")

TEXTS = [f"document {number}: é € " + "word " * number for number in range(200)]


class Touch:
    """A pickle that shows that it was unpickled: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def texts_and_errors(path: Path, *, field: str = "text") -> tuple[list[str], list[str]]:
    documents = list(read_documents(path, where=str(path), field=field))
    texts = [document.text for document in documents if isinstance(document, Text)]
    unread = [document for document in documents if isinstance(document, Unread)]
    return texts, [f"{each.where} {each.why}; {each.way_out}" for each in unread]


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


def packed(content: bytes, name: str) -> bytes:
    if name.endswith((".gz", ".tgz")):
        half = len(content) // 2  # two members, as bgzip and concatenation make them
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    compressors: dict[str, Callable[[bytes], bytes]] = {
        ".zst": zstandard.ZstdCompressor().compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
    }
    compress = compressors.get(Path(name).suffix)
    half = len(content) // 2
    if compress is None:
        return content
    padding = bytes(4) if name.endswith(".xz") else b""  # which may be between streams
    return compress(content[:half]) + padding + compress(content[half:])


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("x.jsonl", json_lines(TEXTS), TEXTS),
        ("X.NDJSON", b"\n" + json_lines(["a", ""]) + b' \n{"text": "c"}', ["a", "", "c"]),
        ("x.txt", "\ufeffa\r\nb\x00".encode(), ["\ufeffa\r\nb\x00"]),
        ("x.md", b"# A *title*\n", ["# A *title*\n"]),
        ("Makefile", b"all:\n", ["all:\n"]),
        ("x.json", json_lines(TEXTS), TEXTS),
        ("x.json", b'\n {"text": "one"}', ["one"]),
        ("x.json", json.dumps([{"text": text} for text in TEXTS]).encode(), TEXTS),
        ("x.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode(), TEXTS),
        ("x.json", json.dumps({"id": 1, "text": "one"}, indent=1).encode() * 3, ["one"] * 3),
        ("x.jsonl", json.dumps([{"text": text} for text in TEXTS], indent=1).encode(), TEXTS),
        ("x.json", codecs.BOM_UTF8 + b'[{"text": "one"}]', ["one"]),
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
    (unread,) = read_documents(tmp_path / name, where=name, field="text")
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


@pytest.mark.parametrize(
    "name",
    [f"x.{kind}.{packing}" for kind in ("jsonl", "tar") for packing in ("gz", "zst", "xz", "bz2")]
    + ["x.tar"],
)
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
        "a/006.tar": tar_of({"1.txt": b"from a tar in it"}),
        "a/007.txt.gz": gzip.compress(b"packed once more"),
        "__" + "long name " * 30 + ".txt": b"long",
    }
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(members))
    texts, errors = texts_and_errors(path)
    assert texts == [
        *("é", "caption", "from json", "from html", "l1", "l2", "# md"),
        *("from a tar in it", "packed once more", "long"),
    ]
    assert [error.split("' ")[0].split("'")[1] for error in errors] == [
        *("a/000.jpg", "a/000.json", "a/005.cls")
    ]


def test_bad_members_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(
        tar_of({"1.json": b"{", "2.jsonl": b'{"text": "a"}\n{}\n', "3.txt": b"\xff", "4.txt": b"b"})
    )
    texts, errors = texts_and_errors(path)
    assert texts == ["a", "b"]
    assert f"{path}, member '1.json', line 1 is not JSON" in errors[0]
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
        list(read_documents(path, where=path.name, field="text"))


def reasons(path: Path) -> dict[str, list[str]]:
    """The names that aren't read, without their file's, by reason."""
    found: dict[str, list[str]] = {}
    for document in read_documents(path, where=path.name, field="text"):
        if isinstance(document, Unread):
            found.setdefault(document.reason, []).append(document.where)
    return found


@pytest.mark.parametrize("packing", ["gz", "zst", "xz", "bz2"])
def test_damage_in_a_second_stream_is_no_end_of_the_file(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"x.jsonl.{packing}"
    path.write_bytes(packed(json_lines(TEXTS), path.name) + b"no stream")
    texts, (error,) = texts_and_errors(path)
    assert texts == TEXTS
    assert "is damaged or not whole" in error


def test_json_lines_named_json_are_one_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    lines = [json.dumps({"text": f"doc {number}", "url": "u"}) for number in range(100)]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert texts_and_errors(path) == ([f"doc {number}" for number in range(100)], [])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_json_array_is_read_whatever_the_pieces_it_comes_in(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_documents, "_CHARACTERS_AT_ONCE", size)
    texts = ['a "quoted\\" [bracket}, é €', "", "]", "\\", "x" * 300]
    records = [{"n": [1, {"m": "]"}], "text": text, "more": None} for text in texts]
    path = tmp_path / "x.json"
    for indent in (None, 2):
        for separator in (",", " ,\n "):
            inner = separator.join(json.dumps(record, indent=indent) for record in records)
            path.write_text(f" [ {inner} ] \n", encoding="utf-8")
            assert texts_and_errors(path) == (texts, [])


def test_no_more_of_a_json_array_is_read_than_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    text = "x" * 1000
    path.write_text(json.dumps([{"text": text}] * 10_000))
    with path.open("rb") as file:
        documents = json_documents.json_values(file, "x.json", "text")
        assert next(documents) == Text("x.json, element 1", text)
        assert file.tell() < 2 * 2**20
        assert sum(isinstance(document, Text) for document in documents) == 9_999


@pytest.mark.parametrize("size", [3, 2**20])
def test_bad_element_of_an_array_is_named_and_the_others_are_read(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_documents, "_CHARACTERS_AT_ONCE", size)
    path = tmp_path / "x.json"
    bad = [
        b"{bad}",
        b"bad",
        b'{"txt": "a, ]"}',
        b"[1]",
        b'"a, ]"',
        b"[" * 50 + b"]" * 50,
        b"3",
        b"",
    ]
    path.write_bytes(b'[{"text": "a"}, ' + b", ".join(bad) + b', {"text": "c"}]')
    texts, errors = texts_and_errors(path)
    assert texts == ["a", "c"]
    assert [error.removeprefix(f"{path}, ").split(" ")[1] for error in errors] == list("23456789")


def test_element_that_is_not_utf8_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"text": "a"}, {"text": "\xe9t\xe9"}, {"text": "c"}]')
    corpus = open_corpus(str(path), on_corrupt=OnCorrupt.fail)
    left_out = LeftOut()
    kept = list(kept_documents(corpus.raw_documents(), left_out=left_out))
    assert [document.text for document in kept] == ["a", "c"]
    assert left_out.examples == {"not_utf8": ["x.json, element 2"]}


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (b"", "doesn't end"),
        (b",", "is not JSON"),
        (b" {}]", "is followed by no comma"),
        (b"] 1", "something follows"),
        (b', {"text": "cut', "is not JSON"),
    ],
)
def test_array_that_is_not_whole_ends_with_an_error(
    tmp_path: Path, end: bytes, reason: str
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"text": "a"}' + end)
    texts, errors = texts_and_errors(path)
    assert texts == ["a"]
    assert reason in errors[0]


def test_object_alone_in_its_file_without_text_is_no_damage_and_names_its_fields(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.json"
    path.write_text('{\n"url": "u",\n"meta": {"title": "t", "n": 1}, "list": []}')
    (unread,) = read_documents(path, where="x.json", field="text")
    assert isinstance(unread, Unread)
    assert unread.reason is Reason.no_text
    assert "url, meta.title, meta.n (a number), list (a list)" in unread.why
    assert "text_field=" in unread.way_out


@pytest.mark.parametrize("content", [b"", b" \n", b"[]", b"[ ]"])
def test_empty_json_file_is_empty(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert reasons(path) == {"empty": ["x.json"]}


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("x.csv", "convert it to .parquet"),
        ("x.tsv.gz", "convert it to .parquet"),
        ("x.jsonl.lz4", "unpack it"),
        ("x.zip", "unpack it"),
        ("x.7z", "unpack it"),
        ("x.tar.Z", "unpack it"),
        ("x.parquet.gz", "unpack it to a .parquet file"),
        ("x.whl", "unpack it"),
        ("x.csv.1", "convert it to .parquet"),
    ],
)
def test_table_or_packing_that_cannot_be_read_is_refused_with_a_way_out(
    tmp_path: Path, name: str, way_out: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_text("text")
    with pytest.raises(DataError, match=rf"{name} is .*{way_out}.*on_corrupt=skip"):
        open_corpus(str(tmp_path), on_corrupt=OnCorrupt.fail)
    open_corpus(str(tmp_path), on_corrupt=OnCorrupt.skip)


def test_unknown_ending_of_what_is_text_is_read_and_told(tmp_path: Path) -> None:
    path = tmp_path / "x.story"
    path.write_text("Once é")
    assert list(read_documents(path, where="x.story", field="text")) == [
        Text("x.story", "Once é", unknown_ending=".story")
    ]


@pytest.mark.parametrize("content", [b"\xff\xd8", b"RIFF\0\0", b"a" * 10_000 + b"\xff", b"7\n"])
def test_unknown_ending_of_what_is_not_text_is_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.cls").write_bytes(content)
    assert reasons(tmp_path / "x.cls") == {"unknown_ending": ["x.cls"]}


@pytest.mark.parametrize("name", ["Makefile", "part.001", "a.b c", "v1.2 notes", "x.py", "X.RST"])
def test_usual_names_of_text_are_not_unknown(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    assert list(read_documents(tmp_path / name, where=name, field="text")) == [Text(name, "text")]


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl.gz", "x.parquet"])
def test_file_that_stands_for_one_in_git_lfs_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    corpus = open_corpus(str(tmp_path), on_corrupt=OnCorrupt.fail)
    with pytest.raises(DataError, match="git lfs pull"):
        list(corpus.raw_documents())


def test_folder_and_its_tar_give_the_same_documents_and_leave_the_same_out(tmp_path: Path) -> None:
    members = {
        "._1.txt": b"\0\5AppleDouble",
        ".git/config": b"[core]",
        ".git/HEAD": b"ref",
        "1.txt": b"one",
        "2.json.gz": gzip.compress(b'{"text": "two"}\n{"text": "three"}\n'),
        "3.json": b'[{"text": "four"}, {"text": "five"}]',
        "4.py": b"six = 6",
        "5.jpg": b"\xff\xd8",
        "6.story": b"seven",
        "7.json": b'{"width": 3}',
        "8.txt": b" \n",
        "9.txt": b"\xff",
        "A.jsonl.xz": lzma.compress(b'{"text": "eight"}\n'),
        "B/c.md": b"nine",
        "C": b"ten",
        "D.cls": b"3",
        "E.csv": b"a,b",
        "F.tar.gz": gzip.compress(tar_of({"1.txt": b"eleven"})),
        "G.txt.gz": b"no gzip",
    }
    for name, content in members.items():
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_bytes(content)
    (tmp_path / "corpus.tar").write_bytes(tar_of(members))
    found = []
    for corpus in ("corpus", "corpus.tar"):
        left_out = LeftOut()
        raw = open_corpus(str(tmp_path / corpus), on_corrupt=OnCorrupt.skip).raw_documents()
        texts = [document.text for document in kept_documents(raw, left_out=left_out)]
        found.append((texts, left_out.num, left_out.unknown_endings))
    assert found[0] == found[1]
    texts, num, endings = found[0]
    assert texts == [
        *("one", "two", "three", "four", "five", "six = 6", "seven", "eight", "nine", "ten"),
        "eleven",
    ]
    assert num == {
        **{"not_utf8": 1, "empty": 1, "duplicate": 0, "corrupt": 2},
        **{"hidden": 2, "unknown_ending": 2, "no_text": 1},
    }
    assert endings == {".story": 1}


@pytest.mark.parametrize(
    "name",
    """c4.jsonl.00,c4.jsonl.1.gz,c4.json copy 2,c4.jsonl (1),c4.jsonl.aa,c4.jsonl.gz.1
    part-00000,part-00000.gz,part-00000.gzip,part-00000.zstd""".replace("\n    ", ",").split(","),
)
def test_json_lines_under_names_of_pieces_copies_and_none_are_documents(
    tmp_path: Path, name: str
) -> None:
    spelt = name.replace(".gzip", ".gz").replace(".zstd", ".zst").replace(".gz.1", ".gz")
    (tmp_path / name).write_bytes(packed(json_lines(TEXTS), spelt))
    assert texts_and_errors(tmp_path / name) == (TEXTS, [])


def test_other_json_without_an_ending_is_read_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "part"
    long = "x" * 100_000
    for content, texts in (
        (json.dumps([{"id": 1, "text": "a"}, {"text": "b"}]), ["a", "b"]),
        (json.dumps({"text": long}) + "\n" + json.dumps({"text": "b"}), [long, "b"]),
        ('\ufeff{"text": "a"}', ["a"]),
        ('{"name": "x"}', ['{"name": "x"}']),
        ('{\n"text": "a"}', ['{\n"text": "a"}']),
        ('{"text": "a"} is JSON\nand this isn\'t', ['{"text": "a"} is JSON\nand this isn\'t']),
    ):
        path.write_text(content)
        assert texts_and_errors(path) == (texts, [])
    path.write_text('{"content": "a"}\n{"content": "b"}\n')
    assert "text_field=" in texts_and_errors(path)[1][0]


@pytest.mark.parametrize("content", [b"/annex/objects/SHA256E-s5--1f.txt\n", None])
def test_file_that_stands_for_one_in_git_annex_is_refused(
    tmp_path: Path, content: bytes | None
) -> None:
    (tmp_path / "x.txt").write_bytes(content or b"../.git/annex/objects/J6/SHA256E-s5--1f.txt\n")
    (unread,) = read_documents(tmp_path / "x.txt", where="x.txt", field="text")
    assert isinstance(unread, Unread)
    assert (unread.reason, unread.way_out) == (Reason.unreadable, "fetch it (git annex get)")


def test_file_that_stands_for_one_in_dvc_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.dvc"
    path.write_text("outs:\n- md5: 1f\n  path: x.txt\n")
    assert "dvc pull" in texts_and_errors(path)[1][0]
    assert list(reasons(path)) == ["unreadable"]
    (tmp_path / "x.txt").write_text("text")
    assert list(reasons(path)) == ["read_already"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(path, "x.txt.dvc")
    assert list(reasons(tmp_path / "x.tar")) == ["read_already"]


@pytest.mark.parametrize(
    ("content", "way_out"),
    [
        (b"PK\3\4\x14\0", "unpack it"),
        (b"SQLite format 3\0", "convert it"),
        (b"\x89HDF\r\n\x1a\n\0", "convert it"),
        (gzip.compress(b"text", mtime=0), "name it .gz"),
        (b"PAR1\x15\0", "name it .parquet"),
    ],
)
@pytest.mark.parametrize("name", ["x", "x.db", "part.001"])
def test_packing_or_table_under_another_name_is_refused_with_a_way_out(
    tmp_path: Path, name: str, content: bytes, way_out: str
) -> None:
    (tmp_path / name).write_bytes(content)
    (error,) = texts_and_errors(tmp_path / name)[1]
    assert way_out in error
    assert list(reasons(tmp_path / name)) == ["corrupt"]


def test_object_over_several_lines_may_begin_with_a_long_one(tmp_path: Path) -> None:
    text = "x" * 200_000
    (tmp_path / "x.json").write_text(f'{{"text": "{text}",\n "url": "u"}}')
    assert texts_and_errors(tmp_path / "x.json") == ([text], [])
