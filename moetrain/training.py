"""What the training command does with a configuration."""

import sys
from datetime import datetime
from pathlib import Path

from data_pipeline import DataError
from launch.dry_run import dry_run
from launch.failure import ClusterError
from launch.plan import choose_plan
from launch.start import start
from moetrain.checkpoint.folders import with_way_out
from moetrain.checkpoint.manifest import CheckpointError
from moetrain.checks import ConfigError
from moetrain.config import check, refit, resolve
from moetrain.exit_codes import BAD_CONFIGURATION, FAILED
from moetrain.redaction import redacted_text
from moetrain.settings import Config


def train(config: Config) -> int:
    """Trains a configuration; returns the exit code."""
    try:
        check(config)
        plan = choose_plan(config.launch, device=config.run.device)
        resolved = resolve(
            config,
            num_workers=plan.num_workers,
            now=datetime.now(),
            gpus_per_node=plan.gpus_per_node,
        )
        if config.dry_run:
            return dry_run(resolved, plan, data=config.data)
        return start(
            resolved,
            plan,
            data=config.data,
            refit=refit,
            report=_report,
        )
    except (ConfigError, DataError) as error:
        print(f"moetrain: {redacted_text(str(error))}", file=sys.stderr)
        return BAD_CONFIGURATION
    except (ClusterError, CheckpointError, OSError) as error:
        print(f"moetrain: {redacted_text(with_way_out(str(error), error))}", file=sys.stderr)
        return FAILED


def _report(run_dir: Path) -> Path:
    # Here, because matplotlib takes a second to import.
    from moetrain.report import render_report

    return render_report(run_dir)
