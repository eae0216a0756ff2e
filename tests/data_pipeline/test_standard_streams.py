"""Commands whose reader goes away: `… | head`."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.commands.standard_streams import persistent_stream

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("buffered", [True, False])
def test_what_nobody_reads_is_thrown_away_and_what_was_read_is_whole(buffered: bool) -> None:
    reading, writing = os.pipe()
    with open(writing, "wb", buffering=-1 if buffered else 0) as pipe:
        stream = io.TextIOWrapper(pipe, encoding="utf-8", write_through=not buffered)
        text = persistent_stream(stream)
        text.write("première ligne\n")
        text.flush()
        assert os.read(reading, 100).decode() == "première ligne\n"
        os.close(reading)
        for _ in range(3):
            text.write("x" * 100_000)
            text.flush()
        os.write(writing, b"by somebody else, to the descriptor")
        text.detach()


# One of each kind: of Hydra's own output, of ours, of a benchmark, and of an error.
COMMANDS = {
    "data_pipeline.inspect": (["--help"], 0),
    "data_pipeline.build": (["corpus=/none", "to=x"], 2),
    "benchmarks.presets": ([], 0),
    "moetrain.report": (["run=/none"], 2),
    "moetrain": (["--cfg", "job"], 0),
}


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_into_head_prints_no_traceback_and_keeps_its_exit_code(
    module: str, tmp_path: Path
) -> None:
    arguments, code = COMMANDS[module]
    reading, writing = os.pipe()
    os.close(reading)  # head has ended already
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", module, *arguments]
    # An error writes to standard error alone; elsewhere that must stay empty.
    out, err = (writing, subprocess.PIPE) if code == 0 else (None, writing)
    done = subprocess.run(command, cwd=tmp_path, env=environ, check=False, stdout=out, stderr=err)
    os.close(writing)
    assert done.returncode == code, done.stderr
    assert not done.stderr


def test_every_command_there_is_outlives_its_reader() -> None:
    files = [
        path
        for package in ("moetrain", "launch", "data_pipeline", "benchmarks", "tests")
        for path in (REPOSITORY / package).rglob("*.py")
        if '\nif __name__ == "__main__":\n' in path.read_text()
    ]
    assert len(files) > 15
    for path in files:
        text = path.read_text()
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        assert {"run_command", "ignore_broken_pipes"} & names, path
