"""The training command for tests, in a process that has imported torch already."""

import os
import sys
from pathlib import Path
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
