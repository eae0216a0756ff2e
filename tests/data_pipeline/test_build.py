"""What `python -m data_pipeline.build` says of the text that it read, and of what it didn't."""

from pathlib import Path

import pytest

from data_pipeline.build import build
from data_pipeline.inspect import InspectSettings, inspect
from data_pipeline.settings import BuildSettings


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
            "0 corrupt, 1 hidden (.DS_Store), 1 unknown ending (cover.jpg)\n"
        ) in printed
        assert "endings that aren't known: 1 .story (once.story)\n" in printed
