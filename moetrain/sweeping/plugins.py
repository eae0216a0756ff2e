"""Third-party sweepers and launchers of Hydra: Optuna, submitit and joblib, where installed.

Owns which of them a configuration may use; replaces Hydra's launcher by `trial_launcher`.
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from data_pipeline.commands.composition import PLUGINS
from moetrain.checks import ConfigError
from moetrain.exit_codes import FAILED
from moetrain.sweeping.combinations import CombinationLauncher
from moetrain.sweeping.demands import JOBLIB, OPTUNA, prepare_study, require_launcher

_SAMPLERS = ("TPE", "Random", "CmaEs", "NSGAII", "MOTPE", "Grid")
_SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"

USABLE: Mapping[str, tuple[str, ...]] = {
    "hydra.launcher._target_": (
        *PLUGINS["hydra.launcher._target_"],
        f"{_SUBMITIT}.SlurmLauncher",
        f"{_SUBMITIT}.LocalLauncher",
        JOBLIB,
    ),
    "hydra.sweeper._target_": (*PLUGINS["hydra.sweeper._target_"], OPTUNA),
    "hydra.sweeper.sampler._target_": tuple(f"optuna.samplers.{n}Sampler" for n in _SAMPLERS),
}

# Each choice, the package that brings it, and how that is imported.
_PACKAGES = {
    "hydra/sweeper=optuna": ("hydra-optuna-sweeper", "hydra_optuna_sweeper"),
    "hydra/launcher=submitit_slurm": ("hydra-submitit-launcher", "hydra_submitit_launcher"),
    "hydra/launcher=submitit_local": ("hydra-submitit-launcher", "hydra_submitit_launcher"),
    "hydra/launcher=joblib": ("hydra-joblib-launcher", "hydra_joblib_launcher"),
}
_INSTEAD = {
    "hydra/launcher=ray": "leave it out: with launch.address=auto the trials of a sweep share a "
    "Ray cluster, each with a driver of its own, so that all of them save when they are stopped",
    "hydra/launcher": "a trial is a training command of its own, and no other launcher was tried "
    "with that: use submitit_slurm, submitit_local, joblib, or none (docs/launching.md)",
    "hydra/sweeper": "no other sweeper was tried with trials that are commands: use optuna, or "
    "lists of values (docs/launching.md)",
}


class SweepEnded(Exception):
    """Ends a sweep from within Hydra, with the exit code so far."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a sweep ended with {code}")
        self.code = code


def require_usable(words: Sequence[str], *, is_sweep: bool) -> None:
    """Raises ConfigError for a plugin on the command line that is missing or can't be used."""
    for word in words:
        found = re.fullmatch(r"\+?\+?(hydra/(?:launcher|sweeper))=(\w+)", word)
        if not found or found[2] == "basic":
            continue
        choice = f"{found[1]}={found[2]}"
        if choice not in _PACKAGES:
            raise ConfigError(found[1], found[2], _INSTEAD.get(choice, _INSTEAD[found[1]]))
        package, module = _PACKAGES[choice]
        if importlib.util.find_spec("hydra_plugins") is None or not importlib.util.find_spec(
            f"hydra_plugins.{module}"
        ):
            raise ConfigError(found[1], found[2], f"is not installed: pip install {package}")
        if not is_sweep:
            raise ConfigError(found[1], found[2], "is of a sweep: add -m, or leave it out")


class SweepPlugins:
    """Makes third-party sweepers and launchers run trials as commands, while it is in force."""

    def __init__(
        self,
        begin: Callable[[Path], Any] | None,
        *,
        combination: Callable[[DictConfig], Any],
        words: Sequence[str],
    ) -> None:
        self._begin, self._combination, self._words = begin, combination, words
        self._batches: Any = None

    @property
    def began(self) -> bool:
        """Whether a plugin has run trials."""
        return self._batches is not None

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Replaces Hydra's creation of sweepers and launchers while the context lasts."""
        sweeper, launcher = Plugins.instantiate_sweeper, Plugins.instantiate_launcher

        def sweeper_of(plugins: Plugins, *, config: DictConfig, **known: Any) -> Sweeper:
            if not _is_hydras_own(config):
                self._prepare(config)
            found = sweeper(plugins, config=config, **known)
            if _is_basic(config.hydra.sweeper) and hasattr(found, "validate_batch_is_legal"):
                # It would compose every combination once more. Nothing begins before all of them
                # are composed (`command.run_command`).
                found.validate_batch_is_legal = _is_composed_anyway  # type: ignore[method-assign]
            return found

        def launcher_of(
            plugins: Plugins,
            hydra_context: HydraContext,
            task_function: TaskFunction,
            config: DictConfig,
        ) -> Launcher:
            inner = launcher(plugins, hydra_context, task_function, config)
            if _is_hydras_own(config):
                return CombinationLauncher(hydra_context, task_function, config)
            assert self._begin is not None
            # Lazy: torch and Ray are loaded only for a sweep that trains.
            from moetrain.sweeping.trial_launcher import TrialLauncher

            self._batches = self._begin(Path(config.hydra.sweep.dir))
            return TrialLauncher(
                self._batches,
                combination=self._combination,
                config=config,
                context=hydra_context,
                inner=None if _is_basic(config.hydra.launcher) else inner,
            )

        Plugins.instantiate_sweeper = sweeper_of  # type: ignore[method-assign,assignment]
        Plugins.instantiate_launcher = launcher_of  # type: ignore[method-assign,assignment]
        try:
            yield
        except (SweepEnded, ConfigError):
            raise
        except Exception as error:
            if self._batches is None:
                raise
            print(f"moetrain: the sweep ended: {error or type(error).__name__}", file=sys.stderr)
            raise SweepEnded(FAILED) from error
        finally:
            Plugins.instantiate_sweeper = sweeper  # type: ignore[method-assign]
            Plugins.instantiate_launcher = launcher  # type: ignore[method-assign]

    def close(self, code: int) -> int:
        """Ends what a plugin has run; returns the exit code."""
        assert self._batches is not None
        return max(code, int(self._batches.close()))

    def _prepare(self, config: DictConfig) -> None:
        """Makes a sweep repeatable; raises ConfigError where that is impossible."""
        if self._begin is None:
            raise ConfigError(
                "hydra.sweeper",
                OmegaConf.select(config, "hydra.runtime.choices.hydra/sweeper"),
                "sweepers and launchers of others are for the training command: python -m moetrain "
                "-m …; as a Ray job: ray job submit --working-dir . -- python -m moetrain -m …",
            )
        require_launcher(config, self._words)
        if config.hydra.sweeper._target_ == OPTUNA:
            prepare_study(config)


def _is_composed_anyway(batch: Sequence[Sequence[str]]) -> None:
    pass


def _is_basic(plugin: DictConfig) -> bool:
    return any(plugin._target_ in own for own in PLUGINS.values())


def _is_hydras_own(config: DictConfig) -> bool:
    return _is_basic(config.hydra.sweeper) and _is_basic(config.hydra.launcher)
