"""Which changed settings are accepted, refused or reported when a run resumes.

Knows settings and manifests; reads no tensor. `changes` says what a setting decides.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import count
from typing import Any

import torch

from data_pipeline.commands.shell import shell_command, shell_word
from moetrain.checkpoint.folders import candidates
from moetrain.checkpoint.manifest import Manifest, step_of
from moetrain.checks import ConfigError
from moetrain.model import Transformer
from moetrain.model.roles import Role, roles_of
from moetrain.optim import learning_rate, state_names
from moetrain.settings import OptimSettings, Resolved, ScheduleSettings
from moetrain.train.changes import Change, Kind, as_plain, as_typed_value, changes

_OF_THE_RATE = ("schedule.", "optim.lr", "train.num_steps")


def is_complete(config: Resolved, manifest: Manifest) -> bool:
    """Returns whether a checkpoint is a run's last one: of its last step, or of its time's end."""
    limit, seconds = config.train.max_seconds, manifest.state.get("seconds", 0.0)
    return manifest.step >= config.train.num_steps or (limit is not None and seconds >= limit)


def what_is_complete(config: Resolved, *, step: int) -> str:
    """Returns what a complete run has, whose last checkpoint is of a step."""
    if step >= config.train.num_steps:
        return f"has all its {config.train.num_steps} steps"
    return f"has had its train.max_seconds={config.train.max_seconds:g}, up to step {step}"


def require_same_model(config: Resolved, manifest: Manifest) -> None:
    """Raises ConfigError where a run can't resume from a checkpoint with these settings.

    That is where the weights would be another model and that isn't accepted, where samples would
    come in another order, where the optimizer would get another optimizer's state, or where the
    schedule would begin at another step than the checkpoint's.
    """
    found = changes(manifest.config, as_plain(config))
    _require_order(config, manifest, found)
    _require_restart(config, manifest)
    _require_optimizer(config, manifest)
    function, accepted = _of_kind(found, Kind.function), config.checkpoint.accept_changes
    fits = _tensors_fit(config, manifest)
    refused = [c for c in function if not fits or c.name not in accepted]
    if not refused:
        return
    whose = " and ".join(
        f"{c.name.removeprefix('model.')} is {as_typed_value(c.before)}" for c in refused
    )
    shapes = "" if fits else ", and its tensors have other shapes"
    ways = f"use {_settings(refused)}, or another run.name"
    if fits and not is_complete(config, manifest):
        ways += _ways_to_another_model(config, manifest, [*accepted, *(c.name for c in refused)])
    raise ConfigError(
        refused[0].name,
        as_typed_value(refused[0].now),
        f"run {config.run.name} is of another model, whose {whose} (its newest checkpoint is of "
        f"step {manifest.step}{shapes}): {ways}",
    )


def require_done_alike(config: Resolved, manifest: Manifest) -> None:
    """Raises ConfigError where a run is finished, and was trained with other settings."""
    if not is_complete(config, manifest):
        return
    found = changes(manifest.config, as_plain(config))
    has = "has all its steps"
    if manifest.step < config.train.num_steps:
        has = f"has had its time, {manifest.state['seconds']:.3g} s"
    if trained := _of_kind(found, Kind.function, Kind.order, Kind.recipe):
        raise ConfigError(
            "run.name",
            config.run.name,
            f"this run {has}, up to {manifest.step}, and was trained with "
            f"{_settings(trained)} (not {', '.join(as_typed_value(c.now) for c in trained)}): it "
            "is left as it is. Use those settings or another run.name, or train on with the new "
            f"ones: {training_on(config, step=manifest.step)}",
        )


def training_on(config: Resolved, *, step: int) -> str:
    """Returns the settings with which a finished run trains as many steps, or as long, again.

    They restart the schedule: in a longer one, a decayed rate would jump back up in the middle.
    """
    train = config.train
    if step < train.num_steps and train.max_seconds is not None:
        return f"train.max_seconds={2 * train.max_seconds:g}"  # the schedule goes by steps
    if train.num_tokens is not None:  # a number of steps can't stand beside it in the command
        more = f"train.num_tokens={2 * step * train.global_batch_size * train.seq_len}"
    elif train.flops is not None:
        more = f"train.flops={2 * train.flops:g}"
    else:
        more = f"train.num_steps={2 * step}"
    return more if config.schedule.name == "constant" else f"schedule.restart_from={step} {more}"


def told_changes(config: Resolved, manifest: Manifest) -> list[Change]:
    """Returns the changed settings to report where a run resumes with others than it had.

    The source of its extensions is among them.
    """
    if not manifest.state.get("samples", 0):  # nothing was trained with the settings before
        return []
    found = changes(manifest.config, as_plain(config))
    of_training = _of_kind(found, Kind.function, Kind.recipe)
    return [c for c in found if c in of_training or c.name.startswith("run.extensions.")]


def in_one_line(config: Resolved, manifest: Manifest, found: Iterable[Change]) -> str:
    """Returns a line with the changed settings and their effect on the learning rate."""
    line = f"from step {manifest.step} on: {', '.join(map(str, found))}"
    if any(c.name.startswith(_OF_THE_RATE) for c in found):
        rate = learning_rate(
            manifest.step,
            peak=config.optim.lr,
            num_steps=config.train.num_steps,
            settings=config.schedule,
        )
        line += f"; the learning rate goes from {_last_rate(manifest):.3g} to {rate:.3g}"
    return line


def _last_rate(manifest: Manifest) -> float:
    """Returns the learning rate of a checkpoint's last step."""
    optim, schedule, train = (manifest.config[part] for part in ("optim", "schedule", "train"))
    known = {field.name for field in fields(ScheduleSettings)}
    return learning_rate(
        manifest.step - 1,
        peak=optim["lr"],
        num_steps=train["num_steps"],
        settings=ScheduleSettings(**{k: v for k, v in schedule.items() if k in known}),
    )


def begins_optimizer(config: Resolved, manifest: Manifest) -> bool:
    """Returns whether a run resumes from a checkpoint with a new optimizer state."""
    return config.optim.restart_from == manifest.step


def require_no_restart(config: Resolved) -> None:
    """Raises ConfigError where a restart from a checkpoint is set for a run that has none."""
    for name, step in _restarts(config):
        raise ConfigError(
            name,
            step,
            f"run {config.run.name} has no checkpoint in {config.run.dir} to resume from: leave it "
            "out, or use the run.name and run.dir of a run that has one of that step",
        )


def _restarts(config: Resolved) -> Iterator[tuple[str, int]]:
    for group, settings in (("schedule", config.schedule), ("optim", config.optim)):
        if settings.restart_from is not None:
            yield f"{group}.restart_from", settings.restart_from


def _require_restart(config: Resolved, manifest: Manifest) -> None:
    """Raises ConfigError for a restart from another step than the checkpoint's.

    A restart that was already set when the checkpoint was saved is accepted.
    """
    for name, step in _restarts(config):
        group = name.partition(".")[0]
        if step in (manifest.step, manifest.config.get(group, {}).get("restart_from")):
            continue
        stands = f"run {config.run.name} stands at step {manifest.step}"
        if manifest.step == 0:
            reason = f"{stands}, where all begins: leave it out"
        elif step > manifest.step:
            reason = f"{stands}, and has not come so far: use {manifest.step}"
        else:
            reason = (
                f"{stands}, and its steps from {step} on were trained without that: use "
                f"{manifest.step}, {_way_from(config, step)}"
            )
        raise ConfigError(name, step, reason)


def _way_from(config: Resolved, step: int) -> str:
    """Returns how to branch a run at an earlier step, or the steps at which one can."""
    run = config.run_dir
    saved = sorted({step_of(path.name) or 0 for path in candidates(run / "checkpoints")})
    if step in saved:
        return f"or begin another run at that step: {_branch(config, step)}"
    listed = ", ".join(map(str, saved)) or "none"
    return f"or another run.name: no checkpoint of that step is kept (there are: {listed})"


def _branch(config: Resolved, step: int) -> str:
    """Returns the command that branches a run, into a folder that doesn't exist yet."""
    run = config.run_dir
    to = next(to for n in count(2) if not (to := run.with_name(f"{run.name}-{n}")).exists())
    branch = ["python", "-m", "moetrain.branch", f"run={run}", f"step={step}", f"to={to}"]
    if config.extensions:
        branch.append(f"extensions=[{','.join(config.extensions)}]")
    return shell_command(branch)


def _require_optimizer(config: Resolved, manifest: Manifest) -> None:
    """Raises ConfigError where a checkpoint has the optimizer state of another optimizer."""
    if not manifest.state.get("step", 0) or begins_optimizer(config, manifest):
        return
    before = {"name": OptimSettings.name, "momentum": OptimSettings.momentum}
    before |= manifest.config.get("optim", {})
    now = as_plain(config)["optim"]
    saved = {n.rpartition(".")[2] for n in manifest.tensors if n.startswith("optimizer.")}
    roles = sorted(roles_of(config.model))
    other = [r for r in roles if _optimizer_of(now, r) != _optimizer_of(before, r)]
    if not other:
        needed = set[str]().union(*(state_names(config.optim, r) for r in roles))
        possible = needed.union(*(state_names(config.optim, r, vectors=True) for r in roles))
        if not saved or needed <= saved <= possible:
            return
        key = "momentum" if config.optim.name == "sgd" else "options"
    elif before["name"] != now["name"]:
        key = "name"
    else:
        freezes = None in (_optimizer_of(now, other[0]), _optimizer_of(before, other[0]))
        key = f"groups.{other[0]}.{'frozen' if freezes else 'optimizer'}"
    add = [f"optim.restart_from={manifest.step}"]
    if is_complete(config, manifest):
        add.append(training_on(config, step=manifest.step))
    # Another optimizer needs its own learning rate and other settings.
    found = changes(manifest.config, as_plain(config))
    theirs = [c for c in found if c.name.startswith("optim.") and "restart" not in c.name]
    raise ConfigError(
        f"optim.{key}",
        _at(now, key),
        f"run {config.run.name} was trained with optim.{key}={_at(before, key)} up to step "
        f"{manifest.step}, and another optimizer can't use the state of that one: use "
        f"{_settings(theirs)}, add {' '.join(add)} to resume with a fresh optimizer state, or "
        "use another run.name",
    )


def _optimizer_of(optim: Mapping[str, Any], role: Role) -> str | None:
    """Returns the name of the optimizer of a role; None where it is frozen."""
    own = optim.get("groups", {}).get(role, {})
    return None if own.get("frozen") else own.get("optimizer") or str(optim["name"])


def _at(optim: Mapping[str, Any], key: str) -> Any:
    """Returns a setting by its path; None where an older version didn't have it."""
    found: Any = optim
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _require_order(config: Resolved, manifest: Manifest, found: Iterable[Change]) -> None:
    samples = manifest.state.get("samples", 0)
    for change in found:
        if change.kind is Kind.order and samples:  # none read yet: none can come twice
            raise ConfigError(
                change.name,
                as_typed_value(change.now),
                f"run {config.run.name} has {as_typed_value(change.before)} up to step "
                f"{manifest.step}, and the order of samples depends on it; some would come twice: "
                "use that, or another run.name",
            )
    if samples and not manifest.state.get("position"):
        raise ConfigError(
            "run.name",
            config.run.name,
            f"its checkpoint of step {manifest.step} is of a version before 0.1.0, which ordered "
            "samples otherwise and doesn't say where it stands: use another run.name",
        )


def _tensors_fit(config: Resolved, manifest: Manifest) -> bool:
    """Returns whether a checkpoint's weights match the model, by name and shape."""
    with torch.device("meta"):
        model = Transformer(config.model)
    named = [*model.named_parameters(), *model.named_buffers()]
    ours = {f"model.{name}": tuple(tensor.shape) for name, tensor in named}
    saved = {n: entry.shape for n, entry in manifest.tensors.items() if n.startswith("model.")}
    return ours == saved


def _ways_to_another_model(config: Resolved, manifest: Manifest, names: list[str]) -> str:
    accept = shell_word(f"checkpoint.accept_changes=[{','.join(names)}]")
    return (
        f". If the change is meant, add {accept}; {_branch(config, manifest.step)} makes another "
        "run of this one to try it in"
    )


def _of_kind(found: Iterable[Change], *kinds: Kind) -> list[Change]:
    return [change for change in found if change.kind in kinds]


def _settings(found: Iterable[Change]) -> str:
    """Returns the overrides that give changed settings their former values."""
    return shell_command(f"{c.name}={as_typed_value(c.before)}" for c in found)
