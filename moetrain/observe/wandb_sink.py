"""Weights & Biases beside metrics.jsonl: the only file that imports wandb.

Owns the promise that W&B never stops, fails or delays a run by more than a bounded moment: no
network, no key, no package, a crash of its service or a full disk each end in one warning and
silence. Leaves it to the caller to keep secrets out of the configuration it hands over.
"""

import logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moetrain.observe.metrics import Record
from moetrain.observe.settings import WandbSettings
from moetrain.redaction import redacted_arguments

logger = logging.getLogger(__name__)

ONLINE_START_SECONDS = 10.0
FINISH_SECONDS = 60.0


class WandbSink:
    """Sends metric records to one W&B run that lives as long as the run folder does.

    The id of that run is kept in `<run_dir>/wandb/run_id`, so that a resumed run goes on in the
    same curves. `resume_step` is the step a resumed run goes on from (None for a fresh one):
    records up to it are with W&B already, and W&B refuses to go back.
    """

    def __init__(
        self,
        settings: WandbSettings,
        *,
        run_name: str,
        run_dir: Path | str,
        config: Mapping[str, Any],
        resume_step: int | None = None,
    ) -> None:
        self._run: Any = None
        self._broken = False
        self._last_step = -1 if resume_step is None else resume_step
        if settings.mode == "disabled":
            return

        def start() -> None:
            self._run = _start(settings, run_name=run_name, run_dir=Path(run_dir), config=config)

        self._guarded("start", start)

    def write(self, record: Record) -> None:
        """Log one record at its own step; a step gone by is not told twice."""
        step = record.get("step")
        if self._run is None or step is None or step < self._last_step:
            return
        values = {k: v for k, v in record.items() if v is not None and math.isfinite(v)}
        self._last_step = int(step)
        self._guarded("log", lambda: self._run.log(values, step=int(step)))

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run, waiting a bounded time for what is still to be uploaded."""
        if self._run is not None:
            self._guarded("finish", lambda: self._run.finish(exit_code=exit_code))
            self._run = None

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            call()
        except Exception as error:  # whatever it is, the training is worth more
            self._broken = True
            self._run = None
            logger.warning("W&B could not %s; going on without it: %s", what, _brief(error))


def _start(
    settings: WandbSettings, *, run_name: str, run_dir: Path, config: Mapping[str, Any]
) -> Any:
    # Read at import. It also keeps W&B from asking for a key on a terminal, which would wait.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode: Any = settings.mode  # W&B spells its few modes out as types
    folder = run_dir / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    wished: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "save_code": False,
        # Else W&B keeps this process's command line as it is.
        "x_disable_meta": redacted_arguments(sys.argv) != sys.argv,
        "init_timeout": ONLINE_START_SECONDS,
        "finish_timeout": FINISH_SECONDS,
    }
    known = wandb.Settings.model_fields  # older versions lack some
    arguments: dict[str, Any] = {
        "project": settings.project,
        "entity": settings.entity,
        "group": settings.group,
        "name": run_name,
        "id": _run_id(folder / "run_id"),
        "resume": "allow",
        "reinit": "create_new",  # a sweep trains several runs in one process
        "dir": str(run_dir),
        "config": dict(config),
        "settings": wandb.Settings(**{k: v for k, v in wished.items() if k in known}),
    }
    try:
        run = wandb.init(mode=mode, **arguments)
    except Exception as error:
        if settings.mode != "online":
            raise
        logger.warning(
            "W&B is not reachable, so its files stay in %s (`wandb sync` sends them later): %s",
            folder,
            _brief(error),
        )
        wandb.teardown()  # else its service holds the id of the run that did not start
        run = wandb.init(mode="offline", **arguments)
    _define_axes(run)
    return run


def _run_id(path: Path) -> str:
    try:
        known = path.read_text().strip()
    except FileNotFoundError:
        known = ""
    if not known:
        known = secrets.token_hex(8)
        path.write_text(known + "\n")
    return known


def _define_axes(run: Any) -> None:
    run.define_metric("step")
    run.define_metric("train/tokens")
    for family in ("train", "router", "optim", "perf", "memory", "data", "validation"):
        run.define_metric(f"{family}/*", step_metric="train/tokens")
    # Kept, but without a chart each: 32 layers of 64 experts are 2048 of them.
    run.define_metric("router/layer_*", step_metric="train/tokens", hidden=True)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
