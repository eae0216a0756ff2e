"""Sweeps: every combination of `-m model.num_experts=8,16` becomes a trial, a command of its own.

Owns what the trials are called and that none begins before all are known to be right. Leaves
running them and their table to `launch`.
"""

import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from data_pipeline import DataError, open_or_build, resolved_dir
from launch import (
    ClusterError,
    RayCluster,
    Trial,
    choose_plan,
    cluster_address,
    lasting,
    run_sweep,
    varied_settings,
)
from moetrain.checks import ConfigError
from moetrain.command import BAD_CONFIGURATION, FAILED, Combination
from moetrain.config import Config, check, resolve

# What a trial waits at least for places: those of the one before it may not be free yet.
TRIAL_WAIT_SECONDS = 60.0


def sweep(combinations: list[Combination[Config]], folder: Path) -> int:
    """Trains every combination; returns the exit code. `folder` is for what the sweep leaves."""
    try:
        trials = _trials(combinations)
        _build_data(combinations)
        return run_sweep(trials, folder=lasting(str(folder)), places=_places(combinations))
    except (ConfigError, DataError) as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    except (ClusterError, OSError) as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return FAILED


def _trials(combinations: list[Combination[Config]]) -> list[Trial]:
    """Returns the commands of a sweep; ConfigError where one of them could not begin."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "--multirun",
            "true",
            "this process is a rank that another launcher has started (RANK, WORLD_SIZE), and a "
            "sweep starts runs: start it without that launcher, on a Ray cluster for several nodes",
        )
    names = [combination.settings.run.name for combination in combinations]
    if None in names or len(set(names)) < len(names):
        base = names[0] or f"{datetime.now():%Y%m%d-%H%M%S}"
        names = [f"{base}-{number}" for number in range(1, len(names) + 1)]
    varied = varied_settings([combination.overrides for combination in combinations])
    trials = []
    for number, combination in enumerate(combinations, start=1):
        config = combination.settings
        config = replace(config, run=replace(config.run, name=names[number - 1]))
        check(config)
        plan = choose_plan(config.launch, device=config.run.device)
        run = resolve(config, num_workers=plan.num_workers, now=datetime.now()).run
        wait = max(config.launch.wait_for_nodes_seconds, TRIAL_WAIT_SECONDS)
        trials.append(
            Trial(
                number=number,
                varied=varied[number - 1],
                command=(
                    *combination.overrides,
                    f"run.name={run.name}",
                    f"run.dir={run.dir}",
                    f"launch.wait_for_nodes_seconds={wait}",
                ),
                run_dir=Path(run.dir, run.name or ""),
                num_workers=plan.num_workers,
            )
        )
    return trials


def _build_data(combinations: list[Combination[Config]]) -> None:
    """Builds shards that are open to be built, which trials beside each other would all do."""
    settings = [combination.settings.data for combination in combinations]
    for data in {resolved_dir(data): data for data in settings if data.dir is None}.values():
        open_or_build(data, progress=True)


def _places(combinations: list[Combination[Config]]) -> int | None:
    """Returns the number of ranks that there is room for at once; None without a cluster."""
    settings = combinations[0].settings.launch
    address = cluster_address(settings)
    if settings.mode == "inline" or not address:
        return None
    cluster = RayCluster.connect(address, allow_unauthenticated=settings.allow_unauthenticated)
    try:
        return cluster.fitting_workers()
    finally:
        cluster.disconnect()  # the trials have connections of their own
