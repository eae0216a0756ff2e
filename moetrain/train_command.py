"""The training command: `moetrain +model=8x7b [key=value …]`, or `python -m moetrain …`."""

from importlib import import_module
from pathlib import Path
from typing import Any

from moetrain.command import Combination, config_dir, run_command
from moetrain.settings import Config

# What trains loads torch and Ray, which takes seconds: `--help`, `--version` and a mistyped setting
# don't wait for them.


def train(config: Config) -> int:
    """Trains a configuration; returns the exit code."""
    return int(import_module("moetrain.training").train(config))


def check(config: Config) -> None:
    """Raises ConfigError where settings contradict each other."""
    import_module("moetrain.config").check(config)


def sweep(combinations: list[Combination[Config]], folder: Path) -> int:
    """Trains every combination; returns the exit code."""
    return int(import_module("moetrain.sweeping.sweep").sweep(combinations, folder))


def in_batches(folder: Path) -> Any:
    """Begins a sweep whose trials come batch by batch."""
    return import_module("moetrain.sweeping.sweep").SweepInBatches(folder)


if __name__ == "__main__":
    run_command(
        train,
        tree=Config,
        module="moetrain",
        files=config_dir(),
        sweep=sweep,
        batches=in_batches,
        check=check,
    )
