"""What a composed configuration gets beyond Hydra's composition, before anything reads it.

Hydra knows each setting by itself. Here the options of extensions are added, and it is decided
which of several settings for one thing is in force.
"""

from collections.abc import Iterable
from contextlib import suppress

from omegaconf import DictConfig, OmegaConf

from data_pipeline.extensions import load_extensions
from moetrain.checks import ConfigError
from moetrain.registries import SELECTED
from moetrain.settings.tree import UNITS

_UNSET = {"schedule.warmup_steps": 0}  # the others may be null


def complete(config: DictConfig) -> None:
    """Completes a configuration that Hydra has composed; ConfigError where that can't be.

    It has Hydra's own settings still, and so the words of its command line.
    """
    add_default_options(config)
    words: list[str] = OmegaConf.select(config, "hydra.overrides.task") or []
    choose_units(config, [word.lstrip("+").partition("=")[0] for word in words])


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

    `given` are the names of a command line's settings. Raises ConfigError where two of one thing
    are.
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
