"""What `python -m data_pipeline.build` reports of the text that it read, and of what it didn't."""

import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from data_pipeline import ShardFolder
from data_pipeline.build import build
from data_pipeline.building.builder import build_shards
from data_pipeline.building.existing import existing_shards
from data_pipeline.commands.shell import escape_output
from data_pipeline.inspect import InspectSettings, inspect
from data_pipeline.settings import BuildSettings, SourceSettings
from data_pipeline.tokenizers.json_tokenizer import train_bpe


def test_what_is_left_out_is_counted_by_reason_and_the_first_few_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number:02d}.txt").write_text(f"text {number}")
    for number in range(4):
        (corpus / f"e{number}.md").write_text(" \n")
    (corpus / "latin.txt").write_bytes("é".encode("latin-1"))
    (corpus / "cover.jpg").write_bytes(b"\xff\xd8")
    (corpus / "once.story").write_text("Once")
    (corpus / ".DS_Store").write_bytes(b"\0")
    build(BuildSettings(corpus=str(corpus), tokenizer="bytes", to=str(tmp_path / "shards")))
    built = capsys.readouterr().out
    inspect(InspectSettings(dir=str(tmp_path / "shards"), verify=False, num_samples=0))
    for printed in (built, capsys.readouterr().out):
        assert (
            "left out: 1 not utf8 (latin.txt), 4 empty (e0.md; e1.md; e2.md; …), 0 duplicate, "
            "0 corrupt, 1 hidden (.DS_Store), 1 unknown ending (cover.jpg); "
            "read as plain text, their endings not being known: 1 .story (once.story)\n"
        ) in printed


NOT_UTF8 = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf8_are_escaped_in_the_index_and_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = Path(f"text_{NOT_UTF8}")
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{NOT_UTF8}{number}.txt").write_text(f"text {number}")
    (corpus / f"{NOT_UTF8}.md").write_text(" ")
    with tarfile.open(corpus / "x.tar", "w") as tar:
        member = tarfile.TarInfo(f"{NOT_UTF8}.md")
        tar.addfile(member, io.BytesIO())
    sources = {"a": SourceSettings(corpus=str(corpus), language=NOT_UTF8, licence=NOT_UTF8)}
    settings = BuildSettings(sources=sources, tokenizer="bytes", to=f"to_{NOT_UTF8}")
    strict = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", strict)
    escape_output()  # as each command does
    build(settings)
    build(settings)  # the index can be read, and holds the same
    inspect(InspectSettings(dir=settings.to, num_samples=0))
    index = ShardFolder.open(settings.to).index
    assert index.build.sources["a"].corpus == r"text_caf\xe9"
    source = index.sources[0]
    assert (source.description, source.language) == (r"text_caf\xe9", r"caf\xe9")
    assert source.left_out_examples["empty"][0] == r"caf\xe9.md"
    strict.flush()
    printed = strict.buffer.getvalue().decode()
    assert "already holds these shards" in printed
    assert r"2 empty (caf\xe9.md; x.tar, member " in printed


def test_index_is_never_written_as_it_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one")
    tokenizer = tmp_path / NOT_UTF8 / "tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text(train_bpe(["one two"] * 20, vocab_size=260))
    settings = BuildSettings(
        corpus=str(tmp_path / "x.txt"),
        tokenizer=str(tokenizer),
        validation_fraction=0.0,
        end_of_document="<|endoftext|>",
        to=str(tmp_path / "to"),
    )
    build_shards(settings, progress=False)
    assert existing_shards(settings) is not None
