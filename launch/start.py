"""Starts a resolved configuration where its plan says, and follows it to the end.

Owns the driver's path through a run. Ranks do everything else.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_pipeline import DataError, DataSettings
from launch.external_run import run_external
from launch.failure import ClusterError, RunFailed
from launch.inline import run_inline
from launch.plan import Plan, is_ray_copy
from launch.run_folder import close_run, complete_save, open_run, prepared_run, report_complete
from launch.run_lock import lock_run
from launch.signals import StopRequest, stops_at_once
from moetrain.checkpoint.folders import with_way_out
from moetrain.checkpoint.manifest import CheckpointError
from moetrain.exit_codes import FAILED
from moetrain.kinds import EventKind
from moetrain.observe import EventLog, ProgressDisplay
from moetrain.redaction import redacted_text
from moetrain.settings import Resolved
from moetrain.train.loop import TrainingError
from moetrain.train.prepare import Prepared


def start(
    config: Resolved,
    plan: Plan,
    *,
    data: DataSettings,
    refit: Callable[[Resolved, int], Resolved | None],
    report: Callable[[Path], object],
) -> int:
    """Runs a resolved configuration to its end; returns the exit code.

    `data` is the data part before it was resolved: it says whether shards may be built. `refit`
    returns a configuration for fewer ranks, None if no layout fits them. `report` is called
    with the run folder at the end. Raises ConfigError or DataError for bad input, before
    anything of the run is written.
    """
    if plan.external:
        run_external(config, plan.external, data=data, report=report)
    run_dir = config.run_dir
    if is_ray_copy(Path.cwd()):
        print(f"the run is kept in {run_dir}, not in Ray's copy of the job's folder", flush=True)
    stop = StopRequest()
    with stops_at_once():
        prepared = prepared_run(config, data)
        with lock_run(run_dir), stop.on_signals():
            return _run(plan, prepared, stop=stop, refit=refit, report=report)


def _run(
    plan: Plan,
    prepared: Prepared,
    *,
    stop: StopRequest,
    refit: Callable[[Resolved, int], Resolved | None],
    report: Callable[[Path], object],
) -> int:
    config = prepared.config
    if good := complete_save(config):
        return report_complete(config, prepared, good, report=report)
    run_dir = open_run(config, prepared)
    event = EventLog(run_dir / "events.jsonl").write
    display = ProgressDisplay(
        mode=config.observe.progress,
        total_steps=config.train.num_steps,
        run_name=config.run.name,
    )
    try:
        with display:
            for line in prepared.lines():
                display.say(line)
            if plan.mode == "inline":
                outcome = run_inline(config, display, stop)
            else:
                # Here, because Ray takes a second to import.
                from launch.supervision.run import run_on_ray

                outcome = run_on_ray(config, display, stop, refit=partial(refit, config))
    except (RunFailed, ClusterError, CheckpointError, DataError, TrainingError, OSError) as error:
        event(EventKind.fail, reason=str(error))
        print(f"moetrain: {redacted_text(with_way_out(str(error), error))}", file=sys.stderr)
        return FAILED
    return close_run(config, outcome, prepared.shards, report)
