"""Hydra's sweepers and launchers of others: Optuna's, submitit's and joblib's, where installed.

Owns what Hydra asks of a launcher. A trial stays what it is in a sweep of ours, a training command
of its own: a sweeper gets its loss, and a launcher starts the command where it starts things. So
names, table and going on are the same. Leaves trials and their runs to `moetrain.sweep`.
"""

import importlib.util
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from data_pipeline.commands.command_line import as_one_run
from data_pipeline.commands.composition import PLUGINS
from data_pipeline.commands.shell import unquoted
from launch import Elsewhere, Result, Trial, run_trial
from moetrain.checks import ConfigError
from moetrain.exit_codes import FAILED

_SAMPLERS = ("TPE", "Random", "CmaEs", "NSGAII", "MOTPE", "Grid")
_SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"

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
_FROM_COMMAND_LINE = ("setup", "additional_parameters")


class SweepEnded(Exception):
    """The end of a sweep in the middle of Hydra, with the exit code so far."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a sweep ended with {code}")
        self.code = code


class Batches(Protocol):
    """A sweep whose trials come batch by batch, from a sweeper that learns from their results."""

    def run(
        self,
        combinations: Sequence[Any],
        *,
        varied: Sequence[dict[str, str]],
        elsewhere: Elsewhere | None,
    ) -> list[Result]:
        """Trains a batch, by a launcher if one is given; raises SweepEnded where that is all.

        `varied` are the values that the sweeper has chosen for each.
        """

    def close(self) -> int:
        """Prints the table of all trials and returns the exit code."""


def demand_usable(words: Sequence[str], *, is_sweep: bool) -> None:
    """Raises ConfigError for a plugin on the command line that isn't there, or can't be used."""
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
    """Has the sweepers and launchers of others run trials as commands, while it is in force."""

    def __init__(
        self,
        begin: Callable[[Path], Batches] | None,
        *,
        combination: Callable[[DictConfig], Any],
        words: Sequence[str],
    ) -> None:
        self._begin, self._combination, self._words = begin, combination, words
        self._batches: Batches | None = None

    @property
    def began(self) -> bool:
        """Whether a plugin has run trials."""
        return self._batches is not None

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Stands in for Hydra's making of sweepers and launchers while the context lasts."""
        sweeper, launcher = Plugins.instantiate_sweeper, Plugins.instantiate_launcher

        def sweeper_of(plugins: Plugins, *, config: DictConfig, **known: Any) -> Sweeper:
            if not _is_hydras_own(config):
                self._prepare(config)
            return sweeper(plugins, config=config, **known)

        def launcher_of(
            plugins: Plugins,
            hydra_context: HydraContext,
            task_function: TaskFunction,
            config: DictConfig,
        ) -> Launcher:
            inner = launcher(plugins, hydra_context, task_function, config)
            if _is_hydras_own(config):
                return inner
            assert self._begin is not None
            self._batches = self._begin(Path(config.hydra.sweep.dir))
            return _TrialLauncher(
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
        return max(code, self._batches.close())

    def _prepare(self, config: DictConfig) -> None:
        """Makes a sweep one that can be repeated; ConfigError where it can't be run so."""
        if self._begin is None:
            raise ConfigError(
                "hydra.sweeper",
                OmegaConf.select(config, "hydra.runtime.choices.hydra/sweeper"),
                "sweepers and launchers of others are for the training command: python -m moetrain "
                "-m …; as a Ray job: ray job submit --working-dir . -- python -m moetrain -m …",
            )
        _demand_launcher(config, self._words)
        if config.hydra.sweeper._target_ == OPTUNA:
            _prepare_study(config)


def _prepare_study(config: DictConfig) -> None:
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
        _demand_storage(str(sweeper.storage))
        _ask_again(str(sweeper.storage), sweeper.study_name, run_name=str(config.run.name))


def _ask_again(storage: str, study_name: str | None, *, run_name: str) -> None:
    """Has a study that is kept try first what it has no loss of: a stop may have come between."""
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


def _demand_storage(storage: str) -> None:
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


def _demand_launcher(config: DictConfig, words: Sequence[str]) -> None:
    """Raises ConfigError for what a launcher can't do, or would run though nobody typed it."""
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


def _is_basic(plugin: DictConfig) -> bool:
    return any(plugin._target_ in own for own in PLUGINS.values())


def _is_hydras_own(config: DictConfig) -> bool:
    return _is_basic(config.hydra.sweeper) and _is_basic(config.hydra.launcher)


class _TrialLauncher(Launcher):
    """What a sweeper has to do with: runs its jobs as trials, by another launcher if need be."""

    def __init__(
        self,
        batches: Batches,
        *,
        combination: Callable[[DictConfig], Any],
        config: DictConfig,
        context: HydraContext,
        inner: Launcher | None,
    ) -> None:
        self._batches, self._combination = batches, combination
        self._config, self._context, self._inner = config, context, inner

    def setup(self, **known: Any) -> None:
        """Is called by Hydra's plugins, which have been passed by here."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs a batch of a sweeper's jobs; what each returns is its loss."""
        setup_globals()
        Path(self._config.hydra.sweep.dir).mkdir(
            parents=True, exist_ok=True
        )  # sweepers write there
        jobs = [
            self._composed(overrides, number)
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        combinations = []
        for job in jobs:
            HydraConfig.instance().set_config(job)
            settings = job.copy()
            with open_dict(settings):
                del settings["hydra"]
            combinations.append(self._combination(settings))
        elsewhere = None
        if self._inner is not None:
            elsewhere = _Elsewhere(
                self._inner, config=self._config, context=self._context, overrides=job_overrides
            )
        varied = [self._chosen(overrides) for overrides in job_overrides]
        results = self._batches.run(combinations, varied=varied, elsewhere=elsewhere)
        return [
            _returned(result, overrides)
            for result, overrides in zip(results, job_overrides, strict=True)
        ]

    def _chosen(self, overrides: Sequence[str]) -> dict[str, str]:
        """Returns what the sweeper has chosen of a job's settings."""
        given = OverridesParser.create().parse_overrides(list(self._config.hydra.overrides.task))
        keys = {o.get_key_element() for o in given if o.is_sweep_override()}
        keys |= {str(key) for key in self._config.hydra.sweeper.get("params") or {}}
        pairs = (as_one_run(override).partition("=") for override in overrides)
        return {key.lstrip("+"): unquoted(value) for key, _, value in pairs if key in keys}

    def _composed(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        return config


def _returned(result: Result, overrides: Sequence[str]) -> JobReturn:
    returned = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    returned.return_value = result.objective
    if result.objective is None:
        returned.status = JobStatus.FAILED
        what = f"trial {result.trial.number} has no loss: {result.end}"
        returned.return_value = RuntimeError(what)
    return returned


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a launcher of others is given to run: a trial's command, by its number in the batch."""

    commands: Mapping[int, Sequence[str]]
    logs: Mapping[int, str]

    def __call__(self, config: DictConfig) -> int:
        number = HydraConfig.get().job.num
        return run_trial(self.commands[number], log=self.logs.get(number))


class _Elsewhere:
    """Runs trials by a launcher of others."""

    def __init__(
        self,
        launcher: Launcher,
        *,
        config: DictConfig,
        context: HydraContext,
        overrides: Sequence[Sequence[str]],
    ) -> None:
        self._launcher, self._config, self._context = launcher, config, context
        self._overrides = overrides
        self.is_local = config.hydra.launcher._target_ == JOBLIB

    @property
    def num_at_once(self) -> int:
        """How many trials run beside each other on this machine; 0: they run on others."""
        if not self.is_local:
            return 0
        wanted = int(self._config.hydra.launcher.n_jobs)
        return len(self._overrides) if wanted < 0 else max(1, wanted)

    @property
    def num_workers(self) -> int | None:
        """The ranks that a job will have, None if the launcher doesn't say."""
        return None if self.is_local else self._config.hydra.launcher.gpus_per_node

    def __call__(self, trials: Mapping[int, Trial], *, folder: Path) -> dict[int, int]:
        """Runs trials, each by its place in the batch; returns exit codes by their numbers."""
        logs = {n: str(folder / f"trial_{t.number}.log") for n, t in enumerate(trials.values())}
        job = _Job(
            commands=dict(enumerate(trial.command for trial in trials.values())),
            logs=logs if self.is_local else {},  # Slurm keeps what jobs say
        )
        self._launcher.setup(hydra_context=self._context, task_function=job, config=self._config)
        # Hydra composes these for the job; what is run is the command, that is in the job itself.
        overrides = [self._overrides[place] for place in trials]
        with _stops_by_interrupt():
            returns = self._launcher.launch(overrides, initial_job_idx=0)
        return {
            trial.number: int(returned.return_value)
            for trial, returned in zip(trials.values(), returns, strict=True)
            if returned.status == JobStatus.COMPLETED
        }


@contextmanager
def _stops_by_interrupt() -> Iterator[None]:
    """Has SIGTERM do what Ctrl-C does: launchers know that one."""

    def handle(_: int, __: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
