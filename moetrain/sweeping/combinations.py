"""Composes the combinations of a sweep: the first by Hydra, and from it those with other values.

Hydra composes each combination from its files, a fifth of a second. Combinations that differ in the
values of settings alone come from the same files: of them the values are set in what was composed
for the one before.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from data_pipeline.commands.hydra_private import ConfigLoaderImpl

# What other settings are worked out from when they are composed (`moetrain.composing`).
_OF_ARMS, _OF_MATCHES = ("arm", "arms", "match"), ("model", "train")


class CombinationLauncher(Launcher):
    """Calls the task with each combination, as Hydra's own launcher does."""

    def __init__(self, context: HydraContext, task: TaskFunction, config: DictConfig) -> None:
        self._groups: dict[str, bool] = {}
        self.setup(hydra_context=context, task_function=task, config=config)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Takes what Hydra gives a launcher."""
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Returns the result of each combination's job."""
        setup_globals()
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        before: list[Override] | None = None
        composed = known = DictConfig({})
        results = []
        for number, words in enumerate(job_overrides, start=initial_job_idx):
            overrides = [_parsed(word) for word in words]
            if before is not None and self._same_files(before, overrides, composed):
                values = [o for o in overrides if not self._is_of_files(o)]
                ConfigLoaderImpl._apply_overrides_to_config(values, composed)
                with read_write(known.hydra), open_dict(known.hydra):
                    known.hydra.overrides.task = list(words)
                    known.hydra.job.id = known.hydra.job.num = number
                results.append(self._called(composed, known=known))
                continue
            before = overrides
            composed = self._context.config_loader.load_sweep_config(self._config, list(words))
            with open_dict(composed):
                composed.hydra.job.id = composed.hydra.job.num = number
            results.append(
                run_job(
                    hydra_context=self._context,
                    task_function=self._task,
                    config=composed,
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                )
            )
            known = _apart(composed)
        return results

    def _same_files(
        self, before: list[Override], now: list[Override], composed: DictConfig
    ) -> bool:
        """Returns whether both are composed of the same files, with only values set anew.

        And with values on which no other setting of `composed`, what is composed of the first,
        depends.
        """
        if self._config.get("extensions"):
            return False  # a value may name another part, which brings options of its own
        if [o.key_or_group for o in before] != [o.key_or_group for o in now]:
            return False
        if any(o.is_delete() or o.is_add() or isinstance(o.value(), dict) for o in now):
            return False
        changed = [b for a, b in zip(before, now, strict=True) if a.input_line != b.input_line]
        is_matched = OmegaConf.select(composed, "match.to") is not None
        decisive = {*_OF_ARMS, *(_OF_MATCHES if is_matched else ())}
        if decisive & {o.key_or_group.partition(".")[0] for o in changed}:
            return False
        return not any(self._is_of_files(o) or isinstance(o.value(), list) for o in changed)

    def _is_of_files(self, override: Override) -> bool:
        """Returns whether it chooses a file, or is of Hydra itself, which reads it as it begins."""
        key = override.key_or_group
        if override.package is not None or key == "hydra" or key.startswith(("hydra.", "hydra/")):
            return True
        if key not in self._groups:
            self._groups[key] = bool(self._context.config_loader.get_group_options(key))
        return self._groups[key]

    def _called(self, config: DictConfig, *, known: DictConfig) -> JobReturn:
        """Calls the task as `run_job` does; `known` is what Hydra knows of the job."""
        hydra, result = HydraConfig.instance(), JobReturn()
        before, hydra.cfg = hydra.cfg, cast(Any, known)
        try:
            result.return_value = self._task(config)
            result.status = JobStatus.COMPLETED
        finally:
            hydra.cfg = before
        return result


def _apart(config: DictConfig) -> DictConfig:
    """Takes Hydra's own settings out of a configuration, which they go on referring to."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(config)
    known, hydra.cfg = cast(DictConfig, hydra.cfg), before
    with read_write(config), open_dict(config):
        del config["hydra"]
    return known


@cache
def _parsed(word: str) -> Override:
    (override,) = OverridesParser.create().parse_overrides([word])
    return override
