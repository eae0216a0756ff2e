"""A large text is built part by part, by any number of workers, to the same bytes."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import DataError, ShardFolder
from data_pipeline.building import parted_build, parts, text_record
from data_pipeline.building.text_record import TEXT_NAME
from data_pipeline.corpora.corpus import open_corpus
from data_pipeline.corpora.raw_documents import RawDocument, Text
from data_pipeline.settings import OnCorrupt
from data_pipeline.shards.unfinished import UnfinishedBuild
from tests.data_pipeline.conftest import build, contents, damaged, documents_of, in_child

HIDDEN = ".to.building"
PART_BYTES = 10_000
SHARD_TOKENS = 2500


def write_large(root: Path) -> dict[str, Path]:
    """Three sources of many parts: lines of one file, files of several kinds, and one small one.

    They have documents in common, empty ones, and lines that are longer than a part.
    """
    random = np.random.default_rng(0)

    def text(number: int) -> str:
        size = int(random.integers(1, 40)) if number % 37 else 3000
        return f"{number} é " + " ".join(map(str, random.integers(0, 10**6, size=size)))

    texts = [text(number) for number in range(240)]
    (root / "lines").mkdir(parents=True)
    (root / "files").mkdir()
    for place in (70, 180, 181, 239):
        texts[place] = texts[place - 60]
    texts[100] = texts[200] = " "
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    lines[50] += "\n \n"  # blank lines count
    (root / "lines" / "a.jsonl").write_text("".join(lines))
    for number in range(60):
        (root / "files" / f"{number:03d}.txt").write_text(texts[number * 4] + " file")
    (root / "files" / "030.jsonl").write_text("".join(lines[120:200]))
    (root / "files" / "031.jsonl").write_text("[" + ",".join(lines[10:40]) + "]")
    (root / "files" / "latin.txt").write_bytes(b"\xe9")
    (root / "files" / ".hidden").write_text("hidden")
    (root / "small.jsonl").write_text("".join(lines[:3]) + json.dumps({"text": "last"}) + "\n")
    return {"lines": root / "lines", "files": root / "files", "small": root / "small.jsonl"}


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    return write_large(tmp_path / "text")


@pytest.fixture
def parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes parts so small that a small text has many; workers get them from this process."""
    monkeypatch.setattr(parted_build, "_PART_BYTES", PART_BYTES)


def build_large(sources: dict[str, Path], to: Path, **settings: Any) -> ShardFolder:
    return build(sources, to, **{"shard_tokens": SHARD_TOKENS, "num_processes": 1} | settings)


def whole(sources: dict[str, Path], to: Path, **settings: Any) -> ShardFolder:
    """The same text in one piece."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parted_build, "_PART_BYTES", 2**30)
        return build_large(sources, to, **settings)


@pytest.mark.usefixtures("parted")
def test_parts_hold_what_one_piece_holds(sources: dict[str, Path], tmp_path: Path) -> None:
    found = build_large(sources, tmp_path / "to")
    expected = whole(sources, tmp_path / "whole")
    assert not damaged(found)
    for name in sources:
        ours, theirs = asdict(found.source(name)), asdict(expected.source(name))
        for split in ("train", "validation"):
            assert documents_of(found, split, source=name) == documents_of(
                expected, split, source=name
            )
            del ours["splits"][split]["shards"], theirs["splits"][split]["shards"]
        # zlib begins anew with each part.
        parted, one = (each["baselines"].pop("zlib_bits_per_byte") for each in (ours, theirs))
        assert (parted is None and one is None) or parted >= one
        assert ours == theirs  # the counts of what was left out, and its places, included
    assert found.source("lines").num_left_out["duplicate"] == 4
    assert found.source("files").num_left_out["duplicate"] > 60
    assert (tmp_path / "to" / TEXT_NAME).read_bytes() == (
        tmp_path / "whole" / TEXT_NAME
    ).read_bytes()
    assert len(found.source("lines").splits["train"].shards) > len(
        expected.source("lines").splits["train"].shards
    )


@pytest.mark.usefixtures("parted")
@pytest.mark.parametrize("tokenizer", ["mixtral-v1", "bpe:400"])
def test_same_bytes_by_one_two_and_four_workers(
    sources: dict[str, Path], tmp_path: Path, tokenizer: str
) -> None:
    built = [
        contents(
            build_large(sources, tmp_path / f"to{n}", tokenizer=tokenizer, num_processes=n).path
        )
        for n in (1, 2, 4)
    ]
    assert built[0] == built[1] == built[2]


def test_small_text_of_several_sources_is_built_as_before(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"small": sources["small"]}
    monkeypatch.setattr(parted_build, "written_sources", None)  # it isn't called
    assert build_large(small, tmp_path / "to").num_tokens("train") > 0


def test_every_line_is_in_one_part_and_has_its_number(tmp_path: Path) -> None:
    texts = [f"{number} {'x' * (number % 50)}" for number in range(300)]
    lines = [json.dumps({"text": text}) + "\n" * (1 + (n % 7 == 0)) for n, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(lines).rstrip("\n"))
    corpus = open_corpus(str(tmp_path / "a.jsonl"), on_corrupt=OnCorrupt.fail)
    expected = list(corpus.raw_documents())
    for part_bytes in (1, 7, 100, 1000, 10**6):
        found: list[RawDocument] = []
        num_lines = 0
        for part in corpus.parts(part_bytes):
            num_before = num_lines if part.begins_inside else 0
            assert num_before == part.num_lines(before=True)
            found += part.after_lines(num_before).raw_documents()
            num_lines = num_before + part.num_lines()
        assert found == expected
        assert all(isinstance(document, Text) for document in found)


@pytest.mark.usefixtures("parted")
def test_corrupt_line_is_named_by_its_number_in_its_file(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    path = sources["lines"] / "a.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[222] = "{\n"
    path.write_text("".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl, line 223 is not JSON"):
        build_large(sources, tmp_path / "to", num_processes=2)
    found = build_large(sources, tmp_path / "to", on_corrupt="skip")
    assert found.source("lines").left_out_examples["corrupt"] == ("a.jsonl, line 223",)
    assert contents(found.path) == contents(
        build_large(sources, tmp_path / "again", on_corrupt="skip", num_processes=2).path
    )


def finished_parts(hidden: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_ino for path in hidden.glob("parts/[!.]*/part.json")}


def killed_after(number: int, method: str, work: Callable[[], object]) -> None:
    """Works in a process that is killed at some call of a function or method of parts."""
    owner = UnfinishedBuild if hasattr(UnfinishedBuild, method) else parts
    call, num_calls = getattr(owner, method), 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal num_calls
        result = call(*given, **named)
        num_calls += 1
        if num_calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def work_until_killed() -> None:
        setattr(owner, method, counted)
        work()

    _, status = os.waitpid(in_child(work_until_killed), 0)
    assert status == signal.SIGKILL


@pytest.mark.usefixtures("parted")
@pytest.mark.parametrize(
    ("number", "method"),
    [(1, "write_file"), (9, "write_file"), (3, "name_folder"), (12, "_describe"), (1, "move")],
)
def test_killed_in_the_middle_it_resumes_part_by_part_to_the_same_bytes(
    sources: dict[str, Path], tmp_path: Path, number: int, method: str
) -> None:
    expected = contents(build_large(sources, tmp_path / "undisturbed").path)
    killed_after(number, method, partial(build_large, sources, tmp_path / "to"))
    assert not (tmp_path / "to").exists()
    if method == "move":  # in the midst of moving
        moved = sorted((tmp_path / HIDDEN / "shards").glob("*.tar"))
        moves = json.loads((tmp_path / HIDDEN / "moves.json").read_text())
        (place,) = [place for place, name in moves.items() if name == moved[0].name]
        moved[0].rename(tmp_path / HIDDEN / "parts" / place)
    before = finished_parts(tmp_path / HIDDEN)
    assert len(before) == {"name_folder": 3, "_describe": 11}.get(method, len(before))
    killed_after(1, "move", partial(build_large, sources, tmp_path / "to", num_processes=2))
    after = finished_parts(tmp_path / HIDDEN)
    assert before.items() <= after.items(), "a complete part is never written again"
    assert contents(build_large(sources, tmp_path / "to", num_processes=2).path) == expected
    assert not (tmp_path / HIDDEN).exists()


@pytest.mark.usefixtures("parted")
@pytest.mark.parametrize("change", ["line", "duplicate", "touched", "fewer"])
def test_text_changed_before_a_resume_is_built_as_it_is(
    sources: dict[str, Path], tmp_path: Path, change: str
) -> None:
    killed_after(1, "move", partial(build_large, sources, tmp_path / "to"))
    before = finished_parts(tmp_path / HIDDEN)
    path = sources["lines"] / "a.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if change == "line":
        lines[160] = json.dumps({"text": "something else"}) + "\n"
    elif change == "duplicate":
        lines[5] = lines[230]
    elif change == "fewer":
        del lines[:120]
    path.write_text("".join(lines))
    os.utime(path, ns=(1, 1))
    expected = contents(build_large(sources, tmp_path / "fresh").path)
    killed_after(1, "move", partial(build_large, sources, tmp_path / "to"))
    after = finished_parts(tmp_path / HIDDEN)
    if change == "touched":
        assert after == before
    elif change == "line":  # the parts before it are those of before
        assert len(after.items() & before.items()) > 10
    found = contents(build_large(sources, tmp_path / "to").path)
    assert found == expected


@pytest.mark.usefixtures("parted")
def test_text_that_changes_between_the_passes_is_read_again(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sources["lines"] / "a.jsonl"
    compare, num_calls = parts.compare_range, 0

    def compare_and_change(job: parts.Job, digests: parts.Range) -> np.ndarray:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            content = path.read_text().replace(" 1", " 2")
            path.write_text(content)
            os.utime(path, ns=(1, 1))
        return compare(job, digests)

    monkeypatch.setattr(parted_build, "compare_range", compare_and_change)
    found = contents(build_large(sources, tmp_path / "to").path)
    assert num_calls == 2
    monkeypatch.undo()
    monkeypatch.setattr(parted_build, "_PART_BYTES", PART_BYTES)
    assert found == contents(build_large(sources, tmp_path / "fresh").path)


@pytest.mark.usefixtures("parted")
def test_text_of_which_only_times_changed_is_taken_for_unchanged(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    built = build_large(sources, tmp_path / "to")
    for path in sources["files"].iterdir():
        os.utime(path, ns=(1, 1))
    before = {path: path.stat().st_ino for path in built.path.glob("*.tar")}
    build_large(sources, tmp_path / "to")
    assert {path: path.stat().st_ino for path in built.path.glob("*.tar")} == before
    shutil.copy(sources["files"] / "001.txt", sources["files"] / "000.txt")
    with pytest.raises(DataError, match="source files: "):
        build_large(sources, tmp_path / "to")
    assert sorted(os.listdir(tmp_path)) == ["text", "to"]


@pytest.mark.usefixtures("parted")
def test_large_text_of_which_only_times_changed_is_compared_part_by_part(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_large(sources, tmp_path / "to")
    os.utime(sources["small"], ns=(1, 1))
    monkeypatch.setattr(text_record, "kept_documents", None)  # which would hold all digests
    build_large(sources, tmp_path / "to")
    assert sorted(os.listdir(tmp_path)) == ["text", "to"]
