"""How often, and how much of, the manifests of a run are read."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from moetrain.checkpoint.folders import broken, candidates
from moetrain.checkpoint.manifest import (
    FileEntry,
    Manifest,
    TensorEntry,
    manifest_text,
    parse_manifest,
    read_manifest,
    read_summary,
    read_to_send,
)
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.stored_blocks import Block, Line, StoredBlocks
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.settings import CheckpointSettings
from tests.support.ranks import replace_in_rank, run_ranks
from tests.support.runs import write_shards
from tests.torture.content import plain_manifest

STEPS = range(1, 7)


def open_store(directory: Path, events: list[Any]) -> CheckpointStore:
    return CheckpointStore(
        directory,
        CheckpointSettings(keep_last=len(STEPS)),
        attempt=1,
        config={},
        mesh={},
        timeout=timedelta(seconds=60),
        event=lambda kind, **fields: events.append((kind, fields)),
    )


def values(salt: int) -> dict[str, torch.Tensor]:
    return {f"t{n}": torch.arange(60.0).reshape(12, 5) + 100 * n + salt for n in range(8)}


def save_all(directory: Path) -> None:
    store = open_store(directory, [])
    for step in STEPS:
        store.save(values(step), step=step, state={"step": step})
    store.wait()


def settle(directory: Path) -> None:
    """Makes the manifests as old as those that a start finds."""
    for path in directory.glob("step_*/manifest.json"):
        os.utime(path, (1e9, 1e9))


def load_and_count(directory: Path) -> tuple[dict[str, int], int, list[Any], list[str]]:
    """Loads on this rank.

    Returns how often it opened each manifest, the step, the events, and what JSON it parsed.
    """
    opened, counting = Counter[str](), True

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if counting and event == "open" and str(arguments[0]).endswith("manifest.json"):
            opened[Path(arguments[0]).parent.name] += 1

    sys.addaudithook(count)
    lines, decode = [], json.JSONDecoder.decode

    def parse(decoder: json.JSONDecoder, text: str) -> Any:
        lines.append(text)
        return decode(decoder, text)

    replace_in_rank(json.JSONDecoder, "decode", parse)
    events: list[Any] = []
    store, found = open_store(directory, events), values(0)
    manifest = store.load_newest(lambda _: found, same_model=lambda _: None)
    counting = False
    assert manifest is not None
    saved = values(manifest.step)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())
    rejected = [fields["checkpoint"] for _, fields in events]
    return dict(opened), manifest.step, rejected, lines


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_ranks(save_all, 2, directory)
    settle(directory)
    return directory


def test_one_rank_reads_each_manifest_once_and_that_of_the_newest_whole(saved: Path) -> None:
    (first, step, _, parsed), *others = run_ranks(load_and_count, 3, saved)
    assert step == STEPS[-1]
    assert first == {f"step_{step:08d}": 1 + (step == STEPS[-1]) for step in STEPS}
    # The two ranks that saved wrote every second tensor: of eight tensors, two lines differ.
    lines = {text for text in parsed if text.startswith("[[")}
    assert len(lines) == 2
    for opened, _, _, parsed in others:
        assert opened == {}
        assert sorted(parsed) == sorted(lines)


def damage_blocks(folder: Path) -> None:
    path = folder / "manifest.json"
    content = bytearray(path.read_bytes())
    content[content.index(b'\n"blocks"') + 20] ^= 1
    path.write_bytes(content)


@pytest.mark.trap(22)
def test_damaged_blocks_are_found_before_a_tensor_is_read_and_told_of(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_ranks(save_all, 2, directory)
    for step in (6, 5):
        damage_blocks(directory / f"step_{step:08d}")
    settle(directory)
    assert read_summary(directory / "step_00000006").step == 6, "its head is whole"
    for _, step, rejected, _ in run_ranks(load_and_count, 2, directory):
        assert step == 4
        assert rejected in ([], ["step_00000006", "step_00000005"])


def test_a_cut_manifest_is_known_by_its_head(saved: Path, tmp_path: Path) -> None:
    """As a whole one is, without its blocks: however many they are, as few bytes are read."""
    folder = tmp_path / "step_00000006"
    folder.mkdir()
    whole = (saved / folder.name / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(whole[:-1])
    assert candidates(tmp_path) == []
    ((name, reason),) = broken(tmp_path)
    assert name == folder.name
    assert re.search(r"has \d+ bytes of blocks, not \d+", reason)


def many_ranks(folder: Path, *, num_ranks: int, num_tensors: int) -> Manifest:
    """Writes the manifest of a checkpoint of many ranks, without the files."""
    rows = 16
    files = [f"rank_{rank:05d}.safetensors" for rank in range(num_ranks)]
    manifest = Manifest(
        step=1, attempt=1, state={}, config={},
        tensors={
            f"t{n}": TensorEntry(
                shape=(num_ranks // 4 * rows, 40), dtype="float32",
                blocks={
                    file: Block((rank // 4 * rows, rank % 4 * 10), (rows, 10))
                    for rank, file in enumerate(files)
                },
            )
            for n in range(num_tensors)
        },
        files={file: FileEntry(size=0, xxh3_128=xxhash.xxh3_128_hexdigest(b"")) for file in files},
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest_text(manifest))
    return manifest


def test_a_block_of_many_ranks_takes_a_number_and_a_rank_parses_only_its_own_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step_00000001"
    manifest = many_ranks(folder, num_ranks=64, num_tensors=32)
    size = (folder / "manifest.json").stat().st_size
    large = many_ranks(tmp_path / "large" / folder.name, num_ranks=640, num_tensors=32)
    more = (tmp_path / "large" / folder.name / "manifest.json").stat().st_size - size
    a_file_of_the_head = 100
    assert more / (640 - 64) < 32 * 8 + a_file_of_the_head  # cuts and number, with commas
    parsed: list[int] = []
    decode = json.JSONDecoder.decode

    def counting(decoder: json.JSONDecoder, text: str) -> Any:
        parsed.append(len(text))
        return decode(decoder, text)

    monkeypatch.setattr(json.JSONDecoder, "decode", counting)
    found = read_manifest(folder)
    head = sum(parsed)
    found.tensors["t3"].blocks["rank_00017.safetensors"]
    assert len(parsed) == 2
    assert parsed[1] < 64 * 8
    assert head < size - 31 * 100, "the blocks are not parsed with the head"
    assert found.tensors == manifest.tensors
    assert large.tensors["t0"].blocks


def test_what_a_rank_gets_and_parses_grows_with_the_ways_tensors_are_cut_not_with_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    for num_ranks in (64, 640):
        folder = tmp_path / str(num_ranks) / "step_00000001"
        written = many_ranks(folder, num_ranks=num_ranks, num_tensors=32)
        sent.append(pickle.dumps(read_to_send(folder)))
    a_file_of_the_head, a_block = 120, 8
    assert len(sent[1]) - len(sent[0]) < (640 - 64) * (a_file_of_the_head + a_block)

    parsed: list[int] = []
    decode = json.JSONDecoder.decode

    def counting(decoder: json.JSONDecoder, text: str) -> Any:
        parsed.append(len(text))
        return decode(decoder, text)

    monkeypatch.setattr(json.JSONDecoder, "decode", counting)
    got: Manifest = pickle.loads(sent[1])
    for name, entry in got.tensors.items():
        assert isinstance(entry.blocks, StoredBlocks)
        file = "rank_00417.safetensors"
        wanted = written.tensors[name].blocks[file]
        assert list(entry.blocks.meeting(wanted)) == [(file, wanted)]
    assert len(parsed) == 1
    assert parsed[0] < 640 * a_block


def test_of_a_grid_only_the_blocks_that_meet_a_part_are_returned() -> None:
    cuts = [[0, 4, 8], [0, 5]]
    blocks = StoredBlocks(
        Line(json.dumps([cuts, [5, 4, 3, 2, 1, 0]]).encode(), num_files=6),
        shape=(10, 7),
        files=list("abcdef"),
    )
    assert blocks.unsound() is None
    assert list(blocks.meeting(Block((5, 5), (3, 2)))) == [("c", Block((4, 5), (4, 2)))]
    assert [file for file, _ in blocks.meeting(Block((3, 4), (2, 2)))] == ["f", "e", "d", "c"]
    assert {f: blocks[f] for f in blocks} == blocks.plain()
    assert blocks["a"] == Block((8, 5), (2, 2))


def as_version_2(folder: Path) -> None:
    """Rewrites a manifest as moetrain wrote it before: all fields, the blocks among them."""
    fields = plain_manifest(folder) | {"format_version": 2}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    fields["xxh3_128"] = xxhash.xxh3_128_hexdigest(text.encode())
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    (folder / "manifest.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def test_checkpoints_of_the_version_before_still_load(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_ranks(save_all, 2, directory)
    before = read_manifest(directory / "step_00000006").tensors
    for folder in directory.glob("step_*"):
        as_version_2(folder)
    settle(directory)
    assert read_manifest(directory / "step_00000006").tensors == before
    assert read_summary(directory / "step_00000006").tensors["t0"].blocks == {}
    for opened, step, rejected, _ in run_ranks(load_and_count, 3, directory):
        assert (step, rejected) == (6, [])
        assert sum(opened.values()) in (0, len(STEPS) + 1)
    with CheckpointReader(directory / "step_00000006") as reader:
        assert torch.equal(reader.read("t2"), values(6)["t2"])
    again = parse_manifest(
        manifest_text(read_manifest(directory / "step_00000006")).encode(),
        directory / "step_00000006",
    )
    assert again.tensors == before


COUNTING = """
import sys
opened = {}
def count(event, arguments):
    if event == "open" and str(arguments[0]).endswith("manifest.json"):
        opened[arguments[0]] = opened.get(arguments[0], 0) + 1
sys.addaudithook(count)
import json, os
from moetrain.__main__ import main
try:
    main()
finally:
    print(json.dumps({str(k).split(os.sep)[-2]: n for k, n in opened.items()}))
"""


@pytest.mark.slow
def test_a_start_reads_the_manifests_of_older_checkpoints_once(tmp_path: Path) -> None:
    """The driver and the rank of a run in line are one process."""
    shards = write_shards(tmp_path)

    def train(steps: int) -> dict[str, int]:
        ran = subprocess.run(
            [
                sys.executable, "-c", COUNTING, "train", "model=toy", f"data.dir={shards}",
                "run.name=a", f"run.dir={tmp_path}", f"train.num_steps={steps}",
                "checkpoint.every_steps=1", "checkpoint.keep_last=20", "train.seq_len=16",
                "train.global_batch_size=2", "observe.progress=off", "schedule.name=constant",
                "schedule.warmup_steps=1",
                "launch.num_workers=1", "model.vocab_size=257", "run.device=cpu",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-2000:]
        found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
        return found

    train(10)
    settle(tmp_path / "a" / "checkpoints")
    opened = train(11)
    assert {opened.pop(f"step_{step:08d}") for step in range(1, 10)} == {1}
    assert opened["step_00000010"] <= 6
