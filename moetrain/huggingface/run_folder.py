"""A run's folder for a model that was not trained here, from which training resumes.

Owns the settings of such a run, the files that make its model known to Hydra, and the command that
trains it. Leaves the source of the tensors to the caller.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from data_pipeline.commands.shell import as_typed, shell_command
from moetrain.checkpoint.manifest import TensorEntry
from moetrain.checkpoint.offline import write_checkpoint
from moetrain.command import config_dir
from moetrain.config import resolve
from moetrain.huggingface.names import model_tensors
from moetrain.settings import Config, ModelSettings, Resolved
from moetrain.settings.validation import validated
from moetrain.train.changes import as_plain

# For continuing with a trained model: a tenth of a learning rate to begin with.
_SEQ_LEN = 4096
_RECIPE: dict[str, dict[str, Any]] = {
    "train": {"num_steps": 1000, "global_batch_size": 128, "validate_every_steps": 100},
    "optim": {"lr": 2e-5},
    "schedule": {"warmup_steps": 100},
    "checkpoint": {"every_steps": 100},
    "parallel": {"recompute": "full"},
}


def starting_config(model: ModelSettings, *, to: Path, has_tokenizer: bool) -> Resolved:
    """Returns the resolved configuration of a run in the folder `to` that is yet to train.

    Raises ConfigError for a model that can't be trained, and for a folder whose name can't be a
    run's.
    """
    run = {"dir": str(to.parent), "name": to.name}
    values = {**_recipe(model, to=to, has_tokenizer=has_tokenizer), "run": run}
    config = validated({**values, "model": asdict(model)}, Config)
    return resolve(config, num_workers=1, now=datetime.now())


def write_run(
    folder: Path,
    config: Resolved,
    *,
    to: Path,
    has_tokenizer: bool,
    state: Mapping[str, Any],
    read: Callable[[str, tuple[slice, ...]], Tensor],
) -> None:
    """Writes the folder of a run that is at step 0, and will be renamed to `to`.

    `read` gives a tensor of the model by its name, or rows of it, in float32: no more is held.
    `state` is what the checkpoint says beside its counters, which are 0.
    """
    (folder / "config.yaml").write_text(yaml.safe_dump(as_plain(config), sort_keys=False))
    write_choices(
        folder,
        to=to,
        model=_given(config.model),
        recipe=_recipe(config.model, to=to, has_tokenizer=has_tokenizer),
    )
    write_checkpoint(
        folder / "checkpoints",
        step=0,
        state={"step": 0, "samples": 0, "tokens": 0, **state},
        config=as_plain(config),
        mesh={"world_size": 1},
        tensors={
            name: TensorEntry(shape=shape, dtype="float32")
            for name, shape in model_tensors(config.model).items()
        },
        read=read,
    )


def write_choices(
    folder: Path, *, to: Path, model: Mapping[str, Any], recipe: Mapping[str, Any]
) -> None:
    """Writes the files by which Hydra knows a run's model, and the recipe that goes with it."""
    name = model_name(to)
    for group, text in {
        "model": _yaml(model),
        "experiment": f"# @package _global_\n{_yaml(recipe)}",
    }.items():
        (folder / group).mkdir()
        (folder / group / f"{name}.yaml").write_text(text)


def training_command(to: Path) -> str:
    """Returns the command that continues training such a folder's model, without its data."""
    overrides = {
        "+model": model_name(to),
        "run.dir": str(to.parent),
        "run.name": to.name,
    }
    words = [f"{key}={as_typed(value)}" for key, value in overrides.items()]
    return shell_command(["python", "-m", "moetrain", "--config-dir", str(to), *words])


def model_name(to: Path) -> str:
    """Returns the name of the folder's model, which differs from moetrain's own presets."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", to.name).strip("-") or "model"
    taken = (config_dir() / "model" / f"{name}.yaml").exists()
    return f"imported-{name}" if taken or not name[0].isalpha() else name


def _recipe(model: ModelSettings, *, to: Path, has_tokenizer: bool) -> dict[str, dict[str, Any]]:
    train = {**_RECIPE["train"], "seq_len": min(_SEQ_LEN, model.max_seq_len)}
    recipe = {**_RECIPE, "train": train}
    return {**recipe, "data": {"tokenizer": str(to / "tokenizer")}} if has_tokenizer else recipe


def _given(model: ModelSettings) -> dict[str, Any]:
    """Returns the settings that differ from their defaults."""
    plain = asdict(model)
    return {
        field.name: plain[field.name]
        for field in fields(ModelSettings)
        if field.default is MISSING or getattr(model, field.name) != field.default
    }


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False)
