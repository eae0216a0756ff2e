"""What a run may change where it goes on from a checkpoint, what is refused and what is told.

Knows settings and manifests; reads no tensor. `changes` says what a setting decides.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_pipeline.shell import shell_command, shell_word
from moetrain.checkpoint import Manifest
from moetrain.checks import ConfigError
from moetrain.model import Transformer
from moetrain.train.changes import Change, Kind, as_plain, changes, shown

if TYPE_CHECKING:
    from moetrain.config import Config


def demand_same_model(config: "Config", manifest: Manifest) -> None:
    """Raises ConfigError where a run can't go on from a checkpoint with these settings.

    Its weights would be another model, unless that is accepted, or its samples come in another
    order.
    """
    found = changes(manifest.config, as_plain(config))
    _demand_order(config, manifest, found)
    function, accepted = _of_kind(found, Kind.function), config.checkpoint.accept_changes
    fits = _tensors_fit(config, manifest)
    refused = [c for c in function if not fits or c.name not in accepted]
    if not refused:
        return
    whose = " and ".join(f"{c.name.removeprefix('model.')} is {shown(c.before)}" for c in refused)
    shapes = "" if fits else ", and its tensors have other shapes"
    ways = f"use {_settings(refused)}, or another run.name"
    if fits and manifest.step < config.train.num_steps:
        ways += _ways_to_another_model(config, manifest, [*accepted, *(c.name for c in refused)])
    raise ConfigError(
        refused[0].name,
        shown(refused[0].now),
        f"run {config.run.name} is of another model, whose {whose} (its newest checkpoint is of "
        f"step {manifest.step}{shapes}): {ways}",
    )


def demand_done_alike(config: "Config", manifest: Manifest) -> None:
    """Raises ConfigError where a run has all its steps already, and was trained otherwise."""
    if manifest.step < config.train.num_steps:
        return
    found = changes(manifest.config, as_plain(config))
    if trained := _of_kind(found, Kind.function, Kind.order, Kind.recipe):
        raise ConfigError(
            "run.name",
            config.run.name,
            f"this run has all its steps, up to {manifest.step}, and was trained with "
            f"{_settings(trained)} (not {', '.join(shown(c.now) for c in trained)}): it is left as "
            "it is. Use those settings, another run.name, or a larger train.num_steps to train on "
            "with the new ones",
        )


def told_changes(config: "Config", manifest: Manifest) -> list[Change]:
    """Returns what a person is told of a run that goes on with other settings than it had."""
    if not manifest.state.get("samples", 0):  # nothing was trained with the settings before
        return []
    return _of_kind(changes(manifest.config, as_plain(config)), Kind.function, Kind.recipe)


def _demand_order(config: "Config", manifest: Manifest, found: Iterable[Change]) -> None:
    samples, step = manifest.state.get("samples", 0), manifest.state.get("step", 0)
    for change in found:
        if change.kind is Kind.order and samples:  # where none has come, none can come twice
            raise ConfigError(
                change.name,
                shown(change.now),
                f"run {config.run.name} has {shown(change.before)} up to step {manifest.step}, and "
                "the order of samples hangs on it; some would come twice: use that, or another "
                "run.name",
            )
    batch = config.train.global_batch_size
    if "position" not in manifest.state and samples != step * batch:
        raise ConfigError(
            "train.global_batch_size",
            batch,
            f"run {config.run.name} has another up to step {manifest.step}, and its checkpoint is "
            "of a version in which that can't change: use that, or another run.name",
        )


def _tensors_fit(config: "Config", manifest: Manifest) -> bool:
    """Returns whether a checkpoint's weights are those of the model, by name and shape."""
    with torch.device("meta"):
        model = Transformer(config.model)
    named = [*model.named_parameters(), *model.named_buffers()]
    ours = {f"model.{name}": tuple(tensor.shape) for name, tensor in named}
    saved = {n: entry.shape for n, entry in manifest.tensors.items() if n.startswith("model.")}
    return ours == saved


def _ways_to_another_model(config: "Config", manifest: Manifest, names: list[str]) -> str:
    run = Path(config.run.dir, config.run.name or "")
    accept = shell_word(f"checkpoint.accept_changes=[{','.join(names)}]")
    branch = ["python", "-m", "moetrain.branch", f"run={run}", f"step={manifest.step}"]
    return (
        f". If the change is meant, add {accept}; "
        f"{shell_command([*branch, f'to={run}-2'])} makes another run of this one to try it in"
    )


def _of_kind(found: Iterable[Change], *kinds: Kind) -> list[Change]:
    return [change for change in found if change.kind in kinds]


def _settings(found: Iterable[Change]) -> str:
    return " ".join(f"{c.name}={shown(c.before)}" for c in found)
