"""Commands for tests, in processes that have imported torch already."""

import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from moetrain.settings import Config
from moetrain.settings.validation import validated
from tests.support.ranks import CONTEXT
from tests.support.runs import tiny_values


def train_command(folder: Path, *, shards: Path, **changes: Any) -> tuple[int, str]:
    """Trains the tiny run of a folder as the command does; returns its exit code and output."""
    changes = {"launch__mode": "inline"} | changes
    values = tiny_values(folder, shards=shards, **changes)
    output = folder / "output"
    process = CONTEXT.Process(target=_train, args=(values, output))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the command hangs"
    return process.exitcode, output.read_text()


def _train(values: dict[str, Any], output: Path) -> None:
    from moetrain.training import train

    output.parent.mkdir(exist_ok=True)
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = train(validated(values, Config))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_module(module: str, *words: str, cwd: Path, timeout: float = 120) -> CompletedProcess[str]:
    """Does what `python -m module words…` does in a folder, without seconds of imports.

    Not for what depends on the first import: variables that are read then, or modules that shadow.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_run_module, args=(module, words, cwd, outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{module} {' '.join(words)} hangs")
        said, errors = (output.read_text() for output in outputs)
    return CompletedProcess([module, *words], process.exitcode, said, errors)


def _run_module(module: str, words: tuple[str, ...], cwd: Path, outputs: list[Path]) -> None:
    for descriptor, output in zip((1, 2), outputs, strict=True):
        opened = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(opened, descriptor)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    sys.argv[1:] = words
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
