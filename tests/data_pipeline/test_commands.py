"""The commands' exit codes and messages, as a user meets them."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data_pipeline.conftest import write_corpus

REPOSITORY = Path(__file__).parents[2]


def run(
    command: str, *arguments: str, cwd: Path, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"data_pipeline.{command}", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=before,
    )


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a command printed, except its progress, which appears only on slow machines."""
    return [line for line in done.stderr.splitlines() if not line.endswith(" s left")]


def test_build_then_build_again_then_inspect(corpus: Path, tmp_path: Path) -> None:
    arguments = (f"corpus={corpus}", "tokenizer=bytes", "to=shards", "licence=CC0-1.0")
    built = run("build", *arguments, cwd=tmp_path)
    assert (built.returncode, told(built)) == (0, [])
    assert "is complete" in built.stdout
    again = run("build", *arguments, cwd=tmp_path)
    assert again.returncode == 0
    assert "already holds" in again.stdout
    assert sorted(os.listdir(tmp_path)) == ["corpus", "shards"], "Hydra leaves nothing behind"
    shown = run("inspect", "dir=shards", cwd=tmp_path)
    assert shown.returncode == 0
    for part in ("every file verified", "CC0-1.0", "Dokument"):
        assert part in shown.stdout
    shard = tmp_path / "shards" / "corpus-train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    damaged = run("inspect", "dir=shards", cwd=tmp_path)
    assert damaged.returncode == 2
    assert shard.name in damaged.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("corpus=nowhere",), "corpus='nowhere' doesn't exist"),
        (("tokenizer=bite",), "tokenizer='bite' is not known; did you mean 'bytes'"),
        (("corpu=stdlib",), "corpu is not a setting; did you mean corpus?"),
        (("+shards=3",), "shards is not a setting; did you mean shard_tokens?"),
        (("validation_fraction=2",), "validation_fraction=2.0 can't be"),
        (("shard_tokens=many",), "shard_tokens"),
        (("shard_tokens=1=2",), "shard_tokens=1=2: must be one whole number: type shard_tokens="),
        (("to=taken",), "to='taken'"),
        (("sources.en.corpus=x",), "describes a build's only source"),
        (("sources.en.copus=x",), "sources.en.corpus must be given"),
        (("sources={en:{corpus:x,lang:y}}",), "did you mean sources.en.language?"),
        (("corpus=a b/ü.jsonl", "name=u"), "corpus='a b/ü.jsonl' doesn't exist"),
        (("corpus='a b/ü.jsonl'", "name=u"), "corpus='a b/ü.jsonl' doesn't exist"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    corpus: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    good = (f"corpus={corpus}", "tokenizer=bytes", "to=shards")
    keys = {argument.split("=")[0] for argument in arguments}
    kept = [argument for argument in good if argument.split("=")[0] not in keys]
    result = run("build", *kept, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["corpus", "taken"]


def test_a_setting_that_must_be_given_is_named(tmp_path: Path) -> None:
    result = run("build", "corpus=stdlib", "tokenizer=bytes", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "data_pipeline.build: to must be given: add to=…\n"


def test_help_says_what_the_command_does(tmp_path: Path) -> None:
    result = run("build", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "tokenised WebDataset shards" in result.stdout
    assert "validation_fraction" in result.stdout


def test_sources_are_given_one_by_one_or_together(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", seed=1)
    one_by_one = (
        f"sources.zz.corpus={corpus}",
        "sources.zz.language=en",
        "sources.a-1.corpus=other",
        "sources.a-1.licence=1.0",
    )
    together = f"sources={{zz:{{corpus:{corpus},language:en}},a-1:{{corpus:other,licence:1.0}}}}"
    built = run("build", *one_by_one, "tokenizer=bytes", "to=shards", cwd=tmp_path)
    assert (built.returncode, told(built)) == (0, [])
    again = run("build", together, "tokenizer=bytes", "to=shards", cwd=tmp_path)
    assert again.stdout == "shards already holds these shards; nothing to do\n"
    shown = run("inspect", "dir=shards", "format=json", cwd=tmp_path)
    assert (shown.returncode, told(shown)) == (0, [])
    sources = json.loads(shown.stdout)["sources"]
    assert [(s["name"], s["language"], s["licence"]) for s in sources] == [
        ("zz", "en", None),
        ("a-1", None, "1.0"),
    ]


def test_disk_that_fills_is_one_message_and_exit_1(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(
        "".join(f'{{"text": "document {number} of many"}}\n' for number in range(500))
    )

    def no_file_over_100_kb() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = ("corpus=corpus.jsonl", "tokenizer=bytes", "to=shards")
    result = run("build", *arguments, cwd=tmp_path, before=no_file_over_100_kb)
    assert result.returncode == 1
    assert "File too large" in result.stderr
    (line,) = told(result)
    assert line.endswith("; the same command resumes from what is finished")
    assert os.listdir(tmp_path) == ["corpus.jsonl"]


def test_killed_build_leaves_no_folder_and_no_process(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("some words to encode\n" * 400_000)
    arguments = ("corpus=corpus.txt", "to=shards", "tokenizer=mixtral-v1", "num_processes=2")
    with subprocess.Popen(
        [sys.executable, "-m", "data_pipeline.build", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 30
        while len(workers := children.read_text().split()) < 2:  # the resource tracker and a worker
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
        if time.monotonic() > deadline:
            for worker in left:
                os.kill(int(worker), signal.SIGKILL)
            pytest.fail(f"workers {left} outlive their parent")
        time.sleep(0.05)
    assert not (tmp_path / "shards").exists()
