"""The requirements on a sweep by a third-party sweeper or launcher: repeatable and safe."""

import re
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from moetrain.checks import ConfigError

OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
_FROM_COMMAND_LINE = ("setup", "additional_parameters")


def prepare_study(config: DictConfig) -> None:
    sweeper = config.hydra.sweeper
    direction = getattr(sweeper.direction, "name", sweeper.direction)
    if direction != "minimize":
        raise ConfigError(
            "hydra.sweeper.direction",
            direction,
            "what a trial returns is its loss on held-out text, or of training if there is none: "
            "use minimize",
        )
    if sweeper.custom_search_space:
        raise ConfigError(
            "hydra.sweeper.custom_search_space",
            sweeper.custom_search_space,
            "nothing is run because a configuration names it: use hydra.sweeper.params",
        )
    # The same command suggests the same values again, and finds their runs. A study that is kept
    # knows what it has tried, and would try that again.
    kept = sweeper.storage is not None
    if not kept and "seed" in sweeper.sampler and sweeper.sampler.seed is None:
        with open_dict(config):
            sweeper.sampler.seed = int(config.get("seed", 0))
    if sweeper.storage is not None:
        _require_storage(str(sweeper.storage))
        _ask_again(str(sweeper.storage), sweeper.study_name, run_name=str(config.run.name))


def _ask_again(storage: str, study_name: str | None, *, run_name: str) -> None:
    """Makes a stored study retry trials without a loss first: the sweep may have been stopped."""
    import optuna

    try:
        study = optuna.load_study(study_name=study_name, storage=storage)
    except (KeyError, ValueError):  # there is none yet, or it has no name
        return
    states = optuna.trial.TrialState
    known = [t.params for t in study.trials if t.state in (states.COMPLETE, states.WAITING)]
    for trial in study.trials:
        ours = trial.user_attrs.get("run.name") == run_name
        if ours and trial.state in (states.RUNNING, states.FAIL) and trial.params not in known:
            known.append(trial.params)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this can change in another Optuna
                study.enqueue_trial(trial.params)


def _require_storage(storage: str) -> None:
    """Raises ConfigError where the libraries of Optuna's database don't fit each other."""
    for package, limit in (("sqlalchemy", (2,)), ("alembic", (1, 14))):
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if tuple(int(n) for n in re.findall(r"\d+", installed)[: len(limit)]) >= limit:
            raise ConfigError(
                "hydra.sweeper.storage",
                storage,
                f"Optuna 2, which Hydra's plugin needs, can't write it with {package} {installed}: "
                "pip install 'sqlalchemy<2' 'alembic<1.14', or leave it out: the same command goes "
                "on without it, from its runs",
            )


def require_launcher(config: DictConfig, words: Sequence[str]) -> None:
    """Raises ConfigError for what a launcher can't do, or would run though the user didn't ask."""
    launcher: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    for key, value in launcher.items():
        name = f"hydra.launcher.{key}"
        typed = any(word.lstrip("+").startswith(name) for word in words)
        if value and key in _FROM_COMMAND_LINE and not typed:
            raise ConfigError(
                name,
                value,
                "would be run, and nothing is run because a file names it: give it on the command "
                "line",
            )
        if key in ("nodes", "tasks_per_node") and int(value) > 1:
            raise ConfigError(
                name,
                value,
                "a trial is one task on one node, which starts a rank for each of its GPUs "
                "(hydra.launcher.gpus_per_node): use 1; for trials of several nodes leave "
                "hydra/launcher out and sweep on a Ray cluster (launch/clusters/slurm.sbatch)",
            )
        if isinstance(value, str) and "\n" in value:
            raise ConfigError(name, value, "must be one line: Slurm's script has it as one")
