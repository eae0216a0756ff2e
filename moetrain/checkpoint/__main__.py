"""`python -m moetrain.checkpoint verify=DIR`: verifies every byte of a run's checkpoints.

Owns the command's settings and its messages. Leaves the checks to `manifest.py`.
"""

import sys
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from data_pipeline.quantities import decimal_size
from data_pipeline.settings import PathText
from moetrain.checkpoint.folders import broken, candidates
from moetrain.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    read_manifest,
    step_of,
    verify_all,
)
from moetrain.command import run_command
from moetrain.exit_codes import BAD_CONFIGURATION, DONE, FAILED


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class VerifySettings:
    """What to verify."""

    verify: PathText
    """A run's folder, its checkpoints, or one of them."""


def main(settings: VerifySettings) -> int:
    """Verifies one checkpoint, or all of a run; returns the exit code."""
    folder = Path(settings.verify)
    one = step_of(folder.absolute().name) is not None or (folder / MANIFEST).exists()
    directory = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    folders = [folder] if one else candidates(directory) if directory.is_dir() else []
    damaged = [] if one or not directory.is_dir() else broken(directory)
    if not folder.is_dir() or not (folders or damaged):
        reason = "has no checkpoints" if folder.is_dir() else "is not a folder"
        print(
            f"verify={folder}: it {reason}: give a run's folder, its checkpoints, or one of them",
            file=sys.stderr,
        )
        return BAD_CONFIGURATION
    for checkpoint in folders:
        try:
            manifest = read_manifest(checkpoint)
            if sys.stderr.isatty():
                print(f"\r\x1b[2K{checkpoint.name} …\r", end="", file=sys.stderr)
            verify_all(checkpoint, manifest)
        except CheckpointError as error:
            damaged.append((checkpoint.name, str(error)))
            continue
        print(f"good      {checkpoint.name}  {_described(manifest)}", flush=True)
    for name, reason in damaged:
        print(f"damaged   {name}: {reason}")
    return FAILED if damaged else DONE


def _described(manifest: Manifest) -> str:
    size = sum(entry.size for entry in manifest.files.values())
    return (
        f"{decimal_size(size)} in {len(manifest.files)} files, {len(manifest.tensors)} tensors, "
        f"attempt {manifest.attempt}"
    )


if __name__ == "__main__":
    run_command(main, tree=VerifySettings, module="moetrain.checkpoint")
