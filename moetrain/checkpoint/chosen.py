"""Which checkpoint of a run a command uses: the newest good one, or that of a step.

Owns the messages where there is none. Leaves the order of checkpoints to `folders.py`.
"""

import sys
from pathlib import Path

from data_pipeline.commands.shell import as_typed, shell_command
from moetrain.checkpoint.folders import candidates, newest_good
from moetrain.checkpoint.manifest import folder_name, read_manifest, step_of, verify_all
from moetrain.checks import ConfigError


def chosen_checkpoint(run_dir: Path, *, step: int | None = None, key: str = "run") -> Path:
    """Returns the folder of a run's newest good checkpoint, or of a step; its files are verified.

    `key` is the setting that names the run. Raises ConfigError where there is no such checkpoint,
    and CheckpointError where the step's checkpoint is corrupted.
    """
    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        raise ConfigError(key, run_dir, _no_run(run_dir))
    _say(f"checking the files of a checkpoint in {directory}")
    if step is None:
        found = newest_good(
            directory, rejected=lambda name, why: _say(f"passing over {name}: {why}")
        )
        if found is None:
            raise ConfigError(key, run_dir, "has no good checkpoint: use another run")
        return found
    folder = directory / folder_name(step)
    if not folder.is_dir():
        there = sorted(s for p in candidates(directory) if (s := step_of(p.name)) is not None)
        listed = ", ".join(map(str, there)) or "none"
        raise ConfigError("step", step, f"{directory} has no such step: use one of {listed}")
    verify_all(folder, read_manifest(folder))
    return folder


def _no_run(run_dir: Path) -> str:
    words = [f"from={as_typed(str(run_dir))}", f"to={as_typed(f'runs/{run_dir.name}')}"]
    command = shell_command(["python", "-m", "moetrain.import_hf", *words])
    if (run_dir / "config.json").is_file():
        return f"is a Hugging Face folder and not a run's: make a run of it first, with {command}"
    if run_dir.exists():
        return "has no checkpoints/: use the own folder of a run"
    may_be_on_hub = len(run_dir.parts) == 2 and run_dir.parts[0] not in ("/", ".", "..", "runs")
    if may_be_on_hub and not run_dir.parent.exists():
        return (
            "is no folder here: use the own folder of a run; of a model on the Hugging Face Hub "
            f"{command} makes one"
        )
    return "is no folder here: use the own folder of a run"


def _say(text: str) -> None:
    print(text, file=sys.stderr)
