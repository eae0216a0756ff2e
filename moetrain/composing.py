"""What a composed configuration gets beyond Hydra's composition, before anything reads it.

Hydra knows each setting by itself. Here the options of extensions are added, the settings of an arm
take the place of those of files, it is decided which of several settings for one thing is in force,
and a setting that matches the arm to another is worked out.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.commands.composition import Composer
from data_pipeline.commands.settings_tree import did_you_mean, is_settings, type_at, without_none
from data_pipeline.extensions import load_extensions
from moetrain.checks import ConfigError, nearest
from moetrain.registries import SELECTED
from moetrain.settings import Config
from moetrain.settings.tree import UNITS
from moetrain.settings.validation import validated

_UNSET = {"schedule.warmup_steps": 0}  # the others may be null
_NOT_IN_ARMS = ("arm", "arms", "dry_run", "extensions", "hydra", "defaults")


def complete(config: DictConfig, composer: Composer) -> None:
    """Completes a configuration that Hydra has composed; ConfigError where that can't be.

    It has Hydra's own settings still, and so the words of its command line.
    """
    add_default_options(config)
    words: list[str] = OmegaConf.select(config, "hydra.overrides.task") or []
    given = {word.lstrip("+").partition("=")[0] for word in words}
    choose_units(config, given)
    if composer.is_sweep or "arms" not in config:
        return
    OmegaConf.update(config, "match.outcome", None)
    if config.arm is None and config.match.to is None:
        return
    without = deepcopy(config)
    if config.arm is not None:
        apply_arm(config, config.arm, given)
        add_default_options(config)
    if config.match.to is not None:
        match_arm(config, without, given, composer)


def add_default_options(config: DictConfig) -> None:
    """Adds the default options of extensions to a composed configuration, where none are given.

    So `--cfg` shows them. Import errors and unknown names are reported when settings are checked.
    """
    if not OmegaConf.select(config, "extensions"):
        return
    with suppress(ValueError):
        load_extensions(config.extensions)
    for registry, setting, place in SELECTED:
        given = OmegaConf.select(config, setting)
        several = OmegaConf.is_list(given)
        for name in given if several else [given]:
            at = f"{place}.{name}" if several else place
            there = OmegaConf.select(config, at) or {}
            for key, value in registry.default_options(name).items():
                if key not in there:
                    OmegaConf.update(config, f"{at}.{key}", value, force_add=True)


def choose_units(config: DictConfig, given: Iterable[str]) -> None:
    """Leaves of settings for one thing the one that is given, in place of those of files.

    `given` are the names of a command line's settings, or an arm's. Raises ConfigError where two of
    one thing are.
    """
    known = set(given)
    for names in UNITS:
        here = [name for name in names if name in known]
        if len(here) > 1:
            raise ConfigError(
                here[0],
                OmegaConf.select(config, here[0]),
                f"can't hold beside {here[1]}: give one of {', '.join(names)}",
            )
        for name in set(names) - set(here) if here else ():
            if OmegaConf.select(config, name) is not None:
                OmegaConf.update(config, name, _UNSET.get(name))


def apply_arm(config: DictConfig, arm: str, given: Iterable[str]) -> None:
    """Sets the settings of an arm, but those that a command line gives (`given`).

    Raises ConfigError for an arm, or a setting of it, that doesn't exist.
    """
    arms: Any = OmegaConf.to_container(config.arms, resolve=False)
    if arm not in arms:
        known = ", ".join(map(str, arms)) or "none"
        raise ConfigError(
            "arm", arm, f"there is no such arm{nearest(arm, [*arms])}; in arms there are {known}"
        )
    settings = dict(_settings_of(arms[arm] or {}, arm=f"arms.{arm}"))
    given = {*given, *(name for names in UNITS if {*given} & {*names} for name in names)}
    ours = {name: value for name, value in settings.items() if not _is_given(name, given)}
    for name, value in ours.items():
        try:
            OmegaConf.update(config, name, value, force_add=True)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"arms.{arm}.{name}", value, reason) from None
    choose_units(config, ours)


def match_arm(
    config: DictConfig, without: DictConfig, given: Iterable[str], composer: Composer
) -> None:
    """Works out the setting that matches the arm to `match.to`, and says how near it came.

    `without` is the configuration without any arm. Raises ConfigError where there is no such
    target, or nothing that matches it.
    """
    if any(not key.startswith("hydra.") for key in OmegaConf.missing_keys(config)):
        return  # which is reported when settings are checked
    arm = _validated(config)
    # Here, because it takes seconds to import torch.
    found = import_module("moetrain.matching").matched(arm, _target(arm, without, given, composer))
    if found.setting is not None:
        OmegaConf.update(config, found.setting, found.value)
        choose_units(config, [found.setting])
    OmegaConf.update(config, "match.outcome", found.outcome)


def _target(arm: Config, without: DictConfig, given: Iterable[str], composer: Composer) -> Config:
    """Returns what an arm is to be matched to, as a whole configuration."""
    name = str(arm.match.to)
    if name in arm.arms:  # trained by the same command
        apply_arm(without, name, given)
        add_default_options(without)
        return _validated(without)
    values = _plain(without)
    path = Path(name, "config.yaml") if Path(name).is_dir() else Path(name)
    if path.is_file():
        try:
            saved = yaml.safe_load(path.read_text())
            return _validated(values | {key: saved[key] for key in ("model", "train")})
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = f"{path} is not the configuration of a run ({type(error).__name__}: {error})"
            raise ConfigError("match.to", name, reason) from None
    if name not in (models := composer.choices("model")):
        arms = ", ".join(arm.arms) or "none"
        raise ConfigError(
            "match.to",
            name,
            f"is neither an arm (in arms there are {arms}), nor a model (there are "
            f"{', '.join(models)}), nor the folder or the config.yaml of a run",
        )
    words = [*without.hydra.overrides.hydra, f"model={name}"]
    model: Any = OmegaConf.to_container(composer.compose(words).model, resolve=True)
    # The same text in the same tokens, whatever the file was written for.
    return _validated(values | {"model": {**model, "vocab_size": arm.model.vocab_size}})


def _settings_of(given: Any, *, arm: str, inside: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the settings of an arm by their paths; ConfigError for one that doesn't exist."""
    if not isinstance(given, Mapping):
        raise ConfigError(arm, given, "must have the settings in which the arm differs; {}: none")
    for key, value in given.items():
        name = f"{inside}.{key}".lstrip(".")
        kind = without_none(type_at(Config, name))
        if kind is None or name.partition(".")[0] in _NOT_IN_ARMS:
            reason = "there is no such setting" if kind is None else "is not for an arm to set"
            close = did_you_mean(name, Config) if kind is None else ""
            raise ConfigError(f"{arm}.{name}", value, reason + close)
        if not is_settings(kind):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _settings_of(value, arm=arm, inside=name)
        else:
            raise ConfigError(
                f"{arm}.{name}",
                value,
                f"has settings of its own, and an arm sets values: write {name}.NAME: VALUE; to "
                f"compare files of the group, sweep over them: -m {name}=A,B",
            )


def _is_given(name: str, given: Iterable[str]) -> bool:
    """Returns whether a command line gives a setting: itself, or the dictionary that it is in."""
    return any(
        name == one or (name.startswith(f"{one}.") and not is_settings(type_at(Config, one)))
        for one in given
    )


def _plain(config: DictConfig) -> dict[str, Any]:
    """Returns the settings of training with what they refer to; a command may have more."""
    nodes = {name: config._get_node(name) for name in Config.__dataclass_fields__}
    return {
        name: OmegaConf.to_container(node, resolve=True)
        if OmegaConf.is_config(node)
        else config[name]
        for name, node in nodes.items()
    }


def _validated(config: DictConfig | dict[str, Any]) -> Config:
    """Returns the typed tree of the settings of training."""
    return validated(_plain(config) if isinstance(config, DictConfig) else config, Config)
