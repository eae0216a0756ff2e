"""The launcher that third-party sweepers get: it runs their jobs as trials.

A trial is a training command of its own, as in a built-in sweep: a sweeper gets its loss, and a
third-party launcher starts the command. So names, table and resuming are the same.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from data_pipeline.commands.command_line import as_one_run
from data_pipeline.commands.shell import unquoted
from data_pipeline.commands.stops import signals_handled
from launch.sweeps.sweep import ExternalLauncher, run_trial
from launch.sweeps.table import Result, Trial
from moetrain.sweeping.demands import JOBLIB


class Batches(Protocol):
    """A sweep whose trials come batch by batch, from a sweeper that learns from their results."""

    def run(
        self,
        combinations: Sequence[Any],
        *,
        varied: Sequence[dict[str, str]],
        elsewhere: ExternalLauncher | None,
    ) -> list[Result]:
        """Trains a batch, by a launcher if one is given; raises SweepEnded where that is all.

        `varied` are the values that the sweeper has chosen for each.
        """

    def close(self) -> int:
        """Prints the table of all trials and returns the exit code."""


class TrialLauncher(Launcher):
    """Runs a sweeper's jobs as trials, by another launcher if one is configured."""

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
        """Called by Hydra's plugins, which aren't used here."""

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
    """The job of a third-party launcher: a trial's command, by its number in the batch."""

    commands: Mapping[int, Sequence[str]]
    logs: Mapping[int, str]

    def __call__(self, config: DictConfig) -> int:
        number = HydraConfig.get().job.num
        return run_trial(self.commands[number], log=self.logs.get(number))


class _Elsewhere:
    """Runs trials by a third-party launcher."""

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
        """How many trials run concurrently on this machine; 0: they run on others."""
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


def _stops_by_interrupt() -> AbstractContextManager[None]:
    """Makes SIGTERM act as Ctrl-C, which launchers handle."""

    def handle(_: int, __: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    return signals_handled([signal.SIGTERM], handle)
