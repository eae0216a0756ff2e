"""Restricts Hydra to composing: nothing is run because a configuration names it.

Hydra instantiates the classes below `hydra.callbacks`, and logging's `dictConfig` calls what a
logging configuration names. A third-party file, such as an experiment, can contain both. So each
composed configuration is checked before Hydra acts on it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data_pipeline.commands.hydra_private import BASIC_LAUNCHER, BASIC_SWEEPER, ConfigLoaderImpl

PLUGINS: Mapping[str, tuple[str, ...]] = {
    "hydra.launcher._target_": (BASIC_LAUNCHER,),
    "hydra.sweeper._target_": (BASIC_SWEEPER,),
}
_LOG_CLASSES = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")
_LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


@dataclass(frozen=True, kw_only=True)
class Composer:
    """What completes a configuration may ask for."""

    is_sweep: bool
    """Whether the configuration is the sweep's own, which is none of its runs."""
    compose: Callable[[Sequence[str]], DictConfig]
    """Returns what other words compose to, from the same files."""
    choices: Callable[[str], list[str]]
    """Returns the names of the files of a group."""


def only_compose(
    plugins: Mapping[str, tuple[str, ...]] = PLUGINS,
    complete: Callable[[DictConfig, "Composer"], None] = lambda config, composer: None,
) -> None:
    """Makes Hydra refuse, from now on in this process, configurations that name code to run.

    `plugins` are the classes that are allowed, by the setting that names them. `complete` may add
    to a configuration before Hydra shows it or passes it on. Ends the process if the command line
    would load a pickle, which can name anything. Otherwise composing such a configuration raises
    ConfigCompositionException: for a run, a sweep and each of its trials.
    """
    # Hydra accepts a prefix, and no other option begins like it.
    if any(word.startswith("--e") for word in sys.argv):
        print("--experimental-rerun: it would load a pickle: give the settings", file=sys.stderr)
        raise SystemExit(2)
    composed = ConfigLoaderImpl.load_configuration
    composed = getattr(composed, "unchecked", composed)

    def checked(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        def other(words: Sequence[str]) -> DictConfig:
            found = composed(self, kwargs["config_name"], [*words], run_mode=RunMode.RUN)
            require_harmless(found, plugins)
            return found

        config = composed(self, *args, **kwargs)
        require_harmless(config, plugins)
        is_sweep = kwargs["run_mode"] == RunMode.MULTIRUN
        choices = self.get_group_options
        complete(config, Composer(is_sweep=is_sweep, compose=other, choices=choices))
        return config

    checked.unchecked = composed  # type: ignore[attr-defined]
    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]


def require_harmless(config: DictConfig, plugins: Mapping[str, tuple[str, ...]] = PLUGINS) -> None:
    """Raises ConfigCompositionException for a configuration that would run something."""
    plain = OmegaConf.to_container(config, resolve=False)
    for path, key, value in _entries(plain):
        at = f"{path}.{key}".lstrip(".")
        in_logging = at.startswith(("hydra.job_logging.", "hydra.hydra_logging."))
        if key == "_target_" and value in plugins.get(at, ()):
            continue
        if key in ("_target_", "()") or (in_logging and not _is_plain_logging(key, value)):
            known = " or ".join(plugins.get(at, ()))
            raise ConfigCompositionException(
                f"{at}={value}: nothing is run because a configuration names it"
                + (f"; only {known} are allowed there" if known else ": leave it out")
            )
    if OmegaConf.select(config, "hydra.job.env_set"):
        raise ConfigCompositionException(
            "hydra.job.env_set: a configuration doesn't set this process's environment: set it "
            "in the shell, or for the ranks by cluster.env"
        )


def _is_plain_logging(key: str, value: Any) -> bool:
    if key == "class":
        return value in _LOG_CLASSES
    # Logging looks up other strings that begin like this.
    return not (isinstance(value, str) and value.startswith(("ext://", "cfg://"))) or (
        value in _LOG_STREAMS
    )


def _entries(node: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields the path, key and value of every entry of nested dictionaries and lists."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield path, str(key), value
            yield from _entries(value, f"{path}.{key}".lstrip("."))
