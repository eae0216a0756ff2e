"""What a run was trained with: the settings in its newest checkpoint, and before that its own.

Reads a run's folder and imports no torch. Leaves the meaning of settings to moetrain.train.changes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moetrain.checkpoint.folders import candidates
from moetrain.checkpoint.manifest import CheckpointError, Manifest, read_summary


@dataclass(frozen=True, kw_only=True)
class TrainedSettings:
    """What a run was trained with."""

    settings: Mapping[str, Any]
    text: str | None = None
    """The fingerprint of the shards; None if no checkpoint has it."""
    is_untrained: bool = False
    """Whether its weights were imported and no step was taken yet."""
    earlier: Mapping[str, Any] = field(default_factory=dict)
    """The first values of settings that a resume changed."""

    @classmethod
    def of(cls, manifest: Manifest) -> "TrainedSettings":
        """Returns the settings in a checkpoint."""
        return cls(
            settings=manifest.config,
            text=manifest.state.get("data") or None,
            is_untrained=manifest.step == 0,
            earlier=_earlier(manifest.state.get("changes", ()), before=manifest.step),
        )


def newest_manifest(run_dir: Path) -> Manifest | None:
    """Returns the summary of a run's newest readable checkpoint: its manifest without blocks."""
    for folder in candidates(run_dir / "checkpoints"):
        try:
            return read_summary(folder)
        except CheckpointError:
            continue  # the ranks will skip it, with an event that says why
    return None


def trained(run_dir: Path) -> TrainedSettings | None:
    """Returns the settings of the run in a folder, None if there is no run."""
    if manifest := newest_manifest(run_dir):
        return TrainedSettings.of(manifest)
    try:
        plain = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, yaml.YAMLError):
        plain = None  # of a run that nothing can be said of: no trial's
    return TrainedSettings(settings=plain if isinstance(plain, dict) else {})


def _earlier(told: Iterable[Mapping[str, Any]], *, before: int) -> dict[str, Any]:
    """Returns the first values of settings that a resume changed."""
    found: dict[str, Any] = {}
    for entry in told:
        if entry["step"] < before:  # else no step was taken with them
            found = {name: value[0] for name, value in entry["changes"].items()} | found
    return found
