"""`python -m moetrain.branch run=DIR to=DIR`: a new run that resumes from a checkpoint of another.

Owns the command: what the new run takes over from the old one, and the record of its origin. The
new one has its own history, attempts and W&B run; the old one isn't changed.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, NonNegativeInt
from pydantic.dataclasses import dataclass

from data_pipeline.quantities import decimal_size
from data_pipeline.settings import PathText
from moetrain.checkpoint.chosen import chosen_checkpoint
from moetrain.checkpoint.folders import Save, commit, next_attempt, staged_folder
from moetrain.checkpoint.manifest import Manifest, read_manifest, verify_all
from moetrain.checks import ConfigError
from moetrain.command import run_command
from moetrain.huggingface.new_folder import exit_code, new_folder, require_new
from moetrain.huggingface.run_folder import training_command, write_choices
from moetrain.huggingface.tokenizer import IMPORTED
from moetrain.kinds import EventKind
from moetrain.observe import EventLog, MetricsFile, append_line, read_events
from moetrain.settings import Resolved
from moetrain.settings.validation import validated_run
from moetrain.train.changes import as_plain

_ORIGINS = (EventKind.import_, EventKind.upcycle, EventKind.branch)
"""Events that say what a run began with; a branch began with it too."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class BranchSettings:
    """Which run is branched, where, and into which folder."""

    run: PathText
    """The run's own folder."""
    to: PathText
    """The new run's folder to make."""
    step: NonNegativeInt | None = None
    """None: that of the newest good checkpoint."""
    extensions: list[str] = field(default_factory=list)
    """Extensions that the run was trained with; a checkpoint alone can't cause an import."""


def branch(settings: BranchSettings) -> int:
    """Branches a run; returns the exit code."""
    run_dir, to = Path(settings.run), Path(os.path.abspath(settings.to))
    return exit_code(lambda: _branch(settings, run_dir, to), command="moetrain.branch")


def _branch(settings: BranchSettings, run_dir: Path, to: Path) -> None:
    if to.resolve().is_relative_to(run_dir.resolve()):
        raise ConfigError("to", to, f"lies in the run {run_dir}: use a folder beside it")
    require_new(to, num_bytes=0)  # said before a large checkpoint is read
    checkpoint = chosen_checkpoint(run_dir, step=settings.step)
    manifest = read_manifest(checkpoint)
    config = validated_run(_own(manifest.config, run_dir, to))
    origin: dict[str, Any] = {
        "run": run_dir.resolve().name,
        "step": manifest.step,
        "attempt": manifest.attempt,
    }
    with new_folder(to) as staged:
        linked = _place(
            checkpoint,
            staged / "checkpoints",
            replace(
                manifest,
                config=as_plain(config),
                state={**manifest.state, "branched_from": origin},
            ),
        )
        _write_settings(staged, config, to=to, note=f"Branched from {run_dir} at {manifest.step}.")
        _copy_history(run_dir, staged, step=manifest.step)
        source = str(run_dir.resolve())
        EventLog(staged / "events.jsonl").write(EventKind.branch, source=source, **origin)
    size = sum(entry.size for entry in manifest.files.values())
    how = "hard links: no room of its own" if linked else "a copy"
    print(
        f"branched  {run_dir} at step {manifest.step}: {decimal_size(size)}, {how}\n"
        f"to        {to}, with the settings of that run: add those that are to change\n"
        f"next      {training_command(to)}"
    )


def _own(config: Mapping[str, Any], run_dir: Path, to: Path) -> dict[str, Any]:
    """Returns a run's configuration as that of its branch."""
    run = {**config.get("run", {}), "dir": str(to.parent), "name": to.name}
    data = dict(config.get("data", {}))
    if Path(data.get("tokenizer", "")).resolve() == (run_dir / IMPORTED).resolve():
        data["tokenizer"] = str(to / IMPORTED)
    return {**config, "run": run, "data": data}


def _place(checkpoint: Path, directory: Path, manifest: Manifest) -> bool:
    """Makes a checkpoint with the files of another; returns whether all of them are hard links.

    A checkpoint's files are never rewritten, so that two runs may share them: if one deletes its
    link, the other keeps the file.
    """
    manifest = replace(manifest, attempt=next_attempt(directory))
    staged = staged_folder(directory, Save(manifest.step, manifest.attempt))
    staged.mkdir()
    linked = [_link_or_copy(checkpoint / name, staged / name) for name in manifest.files]
    placed = commit(directory, staged, manifest)
    if not all(linked):
        verify_all(placed, read_manifest(placed))
    return all(linked)


def _link_or_copy(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        return False
    return True


def _write_settings(folder: Path, config: Resolved, *, to: Path, note: str) -> None:
    """Writes config.yaml, and the choices by which Hydra knows the settings of the old run."""
    plain = as_plain(config)
    text = yaml.safe_dump(plain, sort_keys=False)
    (folder / "config.yaml").write_text(
        f"# {' '.join(note.split())}\n{text}", errors="backslashreplace"
    )
    recipe = {key: value for key, value in plain.items() if key != "model"}
    recipe["run"] = {k: v for k, v in plain["run"].items() if k not in ("name", "dir")}
    write_choices(folder, to=to, model=plain["model"], recipe=recipe)


def _copy_history(run_dir: Path, folder: Path, *, step: int) -> None:
    """Copies what the old run was up to a step: its metrics, what it began with, its tokenizer."""
    if (run_dir / "metrics.jsonl").is_file():
        shutil.copyfile(run_dir / "metrics.jsonl", folder / "metrics.jsonl")
        MetricsFile(folder / "metrics.jsonl").rewind(step)
    for event in read_events(run_dir / "events.jsonl"):
        if event.get("event") in _ORIGINS:
            append_line(folder / "events.jsonl", event)
    if (run_dir / IMPORTED).is_dir():
        shutil.copytree(run_dir / IMPORTED, folder / IMPORTED)


if __name__ == "__main__":
    run_command(branch, tree=BranchSettings, module="moetrain.branch")
