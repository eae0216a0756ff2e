"""A build that is stopped at any moment resumes when it is started again, to the same bytes."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from data_pipeline import BuildSettings, DataError, build_shards
from data_pipeline.settings import SourceSettings
from data_pipeline.shards.unfinished import FinishedShard, UnfinishedBuild, hidden_folder
from data_pipeline.tokenizers.tokenizer import ByteTokenizer
from tests.data_pipeline.conftest import build, contents, damaged, in_child, write_corpus

HIDDEN = ".to.building"


def write_sources(root: Path, *, num_documents: int) -> dict[str, Path]:
    for seed, name in enumerate(("fr", "de")):
        write_corpus(root / name, num_documents=num_documents, seed=seed)
    return {"fr": root / "fr", "de": root / "de"}


def finished_shards(hidden: Path) -> dict[str, tuple[int, int]]:
    """Which files of finished shards there are, and what would change if they were written anew."""
    found = {}
    for record in (hidden / "records").glob("*.json"):
        for name in (f"{record.stem}.tar", f"{record.stem}.documents.npy"):
            status = (hidden / "shards" / name).stat()
            found[name] = (status.st_ino, status.st_mtime_ns)
    return found


def num_records(hidden: Path) -> int:
    try:
        return sum(name.endswith(".json") for name in os.listdir(hidden / "records"))
    except FileNotFoundError:  # not there yet, or just removed
        return 0


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenised in this process."""
    texts: list[str] = []
    encode = ByteTokenizer.encode

    def watched(self: ByteTokenizer, text: str) -> np.ndarray:
        texts.append(text)
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", watched)
    return texts


def at_call(number: int, act: Callable[[], None], work: Callable[[], object]) -> int:
    """Works, acts at one of the calls, of Python's functions and of C's, and counts them all."""
    num_calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal num_calls
        if event in ("call", "c_call"):
            num_calls += 1
            if num_calls == number:
                act()

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return num_calls


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path, tokenizer: str) -> None:
    sources = write_sources(tmp_path, num_documents=100)
    settings = {"tokenizer": tokenizer, "shard_tokens": 2000, "num_processes": 1}
    folder = tmp_path / "undisturbed"
    num_calls = at_call(0, lambda: None, lambda: build(sources, folder, **settings))
    undisturbed = contents(folder)
    assert len(undisturbed) > 40
    random = np.random.default_rng(len(tokenizer))
    hidden = tmp_path / HIDDEN
    num_kills = 0
    while not (tmp_path / "to").exists():
        before = finished_shards(hidden)
        # The first five, together at most 15/20 of all calls, can't end it; a later one may.
        killed_at = int(random.integers((num_kills + 1) * num_calls // 20))
        child = in_child(
            partial(
                at_call,
                killed_at,
                lambda: os.kill(os.getpid(), signal.SIGKILL),
                lambda: build(sources, tmp_path / "to", **settings),
            )
        )
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        num_kills += status == signal.SIGKILL
        if not (tmp_path / "to").exists():
            after = finished_shards(hidden)
            assert before.items() <= after.items(), "a finished shard is never written again"
    print(num_calls, num_kills)
    build(sources, tmp_path / "to", **settings)
    assert contents(tmp_path / "to") == undisturbed
    assert num_kills >= 5
    assert not hidden.exists()


def stop_when(
    tmp_path: Path, is_time: Callable[[], bool], sources: dict[str, Path], **settings: object
) -> None:
    """Kills a build at the first moment at which something holds."""
    child = in_child(lambda: build(sources, tmp_path / "to", **settings))
    while not is_time():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before its time"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (tmp_path / "to").exists()


def stop_after(tmp_path: Path, stem: str, sources: dict[str, Path], **settings: object) -> None:
    """Kills a build once a shard is finished."""
    keep = UnfinishedBuild.keep

    def kept(self: UnfinishedBuild, shard: FinishedShard) -> None:
        keep(self, shard)
        if shard.entry.file == f"{stem}.tar":
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        UnfinishedBuild.keep = kept  # in the child alone
        build(sources, tmp_path / "to", **settings)

    assert os.waitpid(in_child(work), 0)[1] == signal.SIGKILL
    assert not (tmp_path / "to").exists()


def test_documents_of_finished_shards_are_not_tokenised_again(
    tmp_path: Path, tokenised: list[str]
) -> None:
    sources = write_sources(tmp_path, num_documents=60)
    stop_after(tmp_path, "de-train-00001", sources, shard_tokens=2000)
    hidden = tmp_path / HIDDEN
    num_finished = sum(
        json.loads(record.read_bytes())["entry"]["num_documents"]
        for record in (hidden / "records").iterdir()
    )
    assert num_finished > 60
    build(sources, tmp_path / "to", shard_tokens=2000, num_processes=1)
    assert len(tokenised) == 120 - num_finished


@pytest.mark.parametrize(
    "change",
    [
        # In a finished shard; beside it, so that numbers move; at the end of a finished source;
        # and just behind a shard, where another document would have gone into it.
        lambda fr: (fr / "0003.txt").write_text("something else"),
        lambda fr: (fr / "0003.txt").unlink(),
        lambda fr: (fr / "0000a.txt").write_text("something more"),
        lambda fr: (fr / "9999.txt").write_text("something more"),
        lambda fr: [path.unlink() for path in sorted(fr.iterdir())[2:]],
        lambda fr: [path.write_text(f"{path.name}") for path in sorted(fr.iterdir())[20:]],
    ],
)
def test_changed_text_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object]
) -> None:
    sources = write_sources(tmp_path, num_documents=60)
    stop_after(tmp_path, "de-train-00000", sources, shard_tokens=2000)
    change(sources["fr"])
    fresh = build(sources, tmp_path / "fresh", shard_tokens=2000)
    settings = BuildSettings(
        sources={name: SourceSettings(corpus=str(path)) for name, path in sources.items()},
        to=str(tmp_path / "to"),
        tokenizer="bytes",
        shard_tokens=2000,
        validation_fraction=0.2,
    )
    capsys.readouterr()
    build_shards(settings)
    assert "the text isn't what the finished shards were made of" in capsys.readouterr().err
    assert contents(tmp_path / "to") == contents(fresh.path)


def test_text_changed_behind_what_is_finished_keeps_it(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, num_documents=60)
    stop_after(tmp_path, "de-train-00000", sources, shard_tokens=2000)
    (sources["de"] / "9999.txt").write_text("something more")
    fresh = build(sources, tmp_path / "fresh", shard_tokens=2000)
    before = finished_shards(tmp_path / HIDDEN)
    build(sources, tmp_path / "to", shard_tokens=2000)
    assert contents(tmp_path / "to") == contents(fresh.path)
    assert {name: (tmp_path / "to" / name).stat().st_ino for name in before} == {
        name: inode for name, (inode, _) in before.items()
    }


def test_tokenizer_trained_on_other_text_is_trained_again(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, num_documents=60)
    trained = tmp_path / HIDDEN / "trained.json"
    stop_when(tmp_path, trained.exists, sources, tokenizer="bpe:300")
    for number in range(3):  # not all of them can be held out
        (sources["de"] / f"999{number}.txt").write_text(f"{number} lorem ipsum " * 500)
    fresh = build(sources, tmp_path / "fresh", tokenizer="bpe:300")
    build(sources, tmp_path / "to", tokenizer="bpe:300")
    assert contents(tmp_path / "to") == contents(fresh.path)


def test_changed_settings_begin_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = write_sources(tmp_path, num_documents=60)
    stop_after(tmp_path, "fr-train-00001", sources, shard_tokens=2000)
    settings = BuildSettings(
        sources={name: SourceSettings(corpus=str(path)) for name, path in sources.items()},
        to=str(tmp_path / "to"),
        tokenizer="bytes",
        shard_tokens=3000,
        validation_fraction=0.2,
    )
    capsys.readouterr()
    build_shards(settings)
    assert "was of a build with shard_tokens=2000; beginning anew" in capsys.readouterr().err
    fresh = build_shards(replace(settings, to=str(tmp_path / "fresh")))
    assert contents(tmp_path / "to") == contents(fresh.path)


@pytest.mark.parametrize("order", [("fr", "de"), ("de", "fr")])
def test_order_of_sources_is_a_setting(tmp_path: Path, order: tuple[str, str]) -> None:
    sources = write_sources(tmp_path, num_documents=60)
    stop_after(tmp_path, "fr-train-00001", sources, shard_tokens=2000)
    before = finished_shards(tmp_path / HIDDEN)
    folder = build({name: sources[name] for name in order}, tmp_path / "to", shard_tokens=2000)
    assert folder.sources == order
    kept = [(tmp_path / "to" / name).stat().st_ino == before[name][0] for name in before]
    assert all(kept) == (order == ("fr", "de"))


def test_damaged_record_or_shard_is_written_again(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, num_documents=60)
    fresh = build(sources, tmp_path / "fresh", shard_tokens=2000)
    stop_after(tmp_path, "de-train-00001", sources, shard_tokens=2000)
    hidden = tmp_path / HIDDEN
    (hidden / "records" / "fr-train-00001.json").write_text("{")
    os.truncate(hidden / "shards" / "de-train-00000.tar", 512)
    build(sources, tmp_path / "to", shard_tokens=2000)
    assert contents(tmp_path / "to") == contents(fresh.path)


def test_corrupt_text_leaves_what_is_finished(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, num_documents=60)
    last = sources["de"] / "9999.jsonl"
    last.write_text("{")
    with pytest.raises(DataError, match=r"9999\.jsonl.*finished shards are kept in .*\.to\.build"):
        build(sources, tmp_path / "to", shard_tokens=2000)
    before = finished_shards(tmp_path / HIDDEN)
    assert before
    folder = build(sources, tmp_path / "to", shard_tokens=2000, on_corrupt="skip")
    assert folder.source("de").num_left_out["corrupt"] == 1
    assert all((folder.path / name).stat().st_ino == inode for name, (inode, _) in before.items())


def test_second_builder_waits_and_takes_what_the_first_has_built(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sources = write_sources(tmp_path, num_documents=60)
    settings = BuildSettings(corpus=str(sources["fr"]), to=str(tmp_path / "to"), tokenizer="bytes")
    hidden = hidden_folder(settings.to)
    hidden.mkdir()
    gate, opened = os.pipe()
    # Forked before there is the lock, which they would hold too.
    children = [in_child(lambda: (os.read(gate, 1), build_shards(settings))) for _ in range(3)]
    with (hidden / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(opened, b"123")
        said = ""
        while said.count("waiting for the process that builds") < 3:
            said += capfd.readouterr().err
            assert os.waitpid(children[0], os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        assert not (tmp_path / "to").exists()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert not damaged(build_shards(settings))
    assert not hidden.exists()


def test_full_disk_is_told_and_the_same_build_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk can't be mounted: {mounted.stderr.decode().strip()}")
    try:
        sources = write_sources(tmp_path, num_documents=150)
        with pytest.raises(OSError, match=r"No space left.*\.to\.building") as full:
            build(sources, disk / "to", shard_tokens=5000)
        assert full.value.errno == errno.ENOSPC
        assert os.listdir(disk) == [HIDDEN]
        finished = finished_shards(disk / HIDDEN)
        assert finished
        assert set(os.listdir(disk / HIDDEN / "shards")) == set(finished), "half of one is removed"
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        folder = build(sources, disk / "to", shard_tokens=5000)
        inodes = {name: (folder.path / name).stat().st_ino for name in finished}
        assert inodes == {name: inode for name, (inode, _) in finished.items()}
        fresh = build(sources, tmp_path / "fresh", shard_tokens=5000)
        assert contents(folder.path) == contents(fresh.path)
        assert os.listdir(disk) == ["to"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def start_long_build(tmp_path: Path) -> subprocess.Popen[str]:
    """A command that builds with two processes and has finished a shard."""
    process = start_build(tmp_path, path=str(Path(__file__).parents[2]))
    while not num_records(tmp_path / HIDDEN):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def start_build(tmp_path: Path, *, path: str) -> subprocess.Popen[str]:
    """A command that builds with two processes."""
    write_corpus(tmp_path / "corpus", num_documents=100)
    numbers = np.random.default_rng(0).integers(0, 10**9, size=(40, 40_000))  # no word twice
    for number, row in enumerate(numbers.tolist()):
        (tmp_path / "corpus" / f"long{number}.txt").write_text(" ".join(map(str, row)))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "data_pipeline.build", "corpus=corpus", "to=to"),
            *("tokenizer=mixtral-v1", "num_processes=2", "shard_tokens=2000"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_stopped_command_says_that_it_goes_on(tmp_path: Path) -> None:
    with start_long_build(tmp_path) as process:
        os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: its workers get it too
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said.endswith("stopped; the same command resumes from what is finished\n")
    assert "Traceback" not in said
    assert not (tmp_path / "to").exists()
    assert finished_shards(tmp_path / HIDDEN)


HELD = """
import os, sys, time
if any("spawn_main" in word for word in sys.orig_argv):
    open(f"held_{os.getpid()}", "x").close()
    while not os.path.exists("go"):
        time.sleep(0.01)
"""


def start_held_build(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A command whose two processes begin, until the file `go` is there; and their ids."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(HELD)
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[2])])
    process = start_build(tmp_path, path=path)
    while len(held := list(tmp_path.glob("held_*"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    return process, [int(file.name.removeprefix("held_")) for file in held]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_only_begins_leaves_a_stop_to_the_command(tmp_path: Path) -> None:
    """It is of the command's group until it has begun, and a scheduler signals all of that."""
    process, held = start_held_build(tmp_path)
    with process:
        masks = [Path(f"/proc/{pid}/status").read_text() for pid in held]
        os.killpg(process.pid, signal.SIGTERM)
        (tmp_path / "go").touch()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    for mask in masks:
        (blocked,) = re.findall(r"SigBlk:\s*(\w+)", mask)
        for signum in (signal.SIGTERM, signal.SIGINT):
            assert int(blocked, 16) >> (signum - 1) & 1, signum.name


def test_a_worker_that_is_killed_while_another_begins_ends_the_command(tmp_path: Path) -> None:
    """The pool then sends a SIGTERM, which the one that begins doesn't hear."""
    process, held = start_held_build(tmp_path)
    with process:
        os.kill(held[0], signal.SIGKILL)
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
            (tmp_path / "go").touch()  # without its command the other one ends, too
    assert process.returncode == 1
    assert "no process that tokenises could begin" in said
    assert "Traceback" not in said


def test_killed_worker_ends_the_command_with_a_message(tmp_path: Path) -> None:
    with start_long_build(tmp_path) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)  # after the tracker of resources
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a process that tokenises was killed" in said
    assert said.endswith("; the same command resumes from what is finished\n")
    assert "Traceback" not in said
    assert finished_shards(tmp_path / HIDDEN)
