"""Weights & Biases beside metrics.jsonl: the only file that imports wandb.

Owns the promise that W&B never stops or fails a run, or delays it by more than a bounded time: no
network, no key, no package, a crash of its service or a full disk each end in one warning and
silence. The caller keeps secrets out of the configuration.
"""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.observe.metrics import Record, Sink, numbers_of
from moetrain.observe.stored_loads import EXPERT_LOAD, expert_load
from moetrain.observe.wandb_identity import wandb_run_id
from moetrain.redaction import redacted_arguments
from moetrain.settings import WandbSettings

logger = logging.getLogger(__name__)

ONLINE_START_SECONDS = 10.0
FINISH_SECONDS = 60.0
PROJECT = "moetrain"


_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""The values of WANDB_MODE, and the mode of each."""
_OURS = {
    "WANDB_NAME": "the run's name is run.name",
    "WANDB_RUN_ID": "the id is kept in the run's folder",
    "WANDB_RESUME": "a resumed run always uses its own W&B run",
}
"""What is decided here, whatever the environment says."""


class WandbSink(Sink):
    """Sends metric records to one W&B run that lives as long as the run folder does.

    The id of that run is kept in `<run_dir>/wandb/run_id`, so that a resumed run continues the same
    curves. `resume_step` is the step from which a resumed run continues (None for a new one): W&B
    has the records up to it already, and refuses to go back. `tell` is called with messages for the
    user: that W&B isn't as requested, and why.
    """

    def __init__(
        self,
        settings: WandbSettings,
        *,
        run_name: str,
        run_dir: Path | str,
        config: Mapping[str, Any],
        resume_step: int | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._run: Any = None
        self._broken = False
        self._last_step = -1 if resume_step is None else resume_step
        self._tell_person = tell
        self._first_moe_layer = config.get("model", {}).get("num_dense_layers", 0)
        mode = wandb_mode(settings, os.environ, tell=self._tell)
        if mode == "disabled":
            return

        def start() -> None:
            self._run = _start(
                settings,
                mode=mode,
                run_name=run_name,
                run_dir=Path(run_dir),
                config=config,
                tell=self._tell,
            )

        self._guarded("start", start)

    def write(self, record: Record) -> None:
        """Logs the finite numbers of a record at its step, and the loads as histograms.

        A step is never logged twice.
        """
        values = {k: v for k, v in numbers_of(record).items() if v is not None and math.isfinite(v)}
        step = values.get("step")
        if self._run is None or step is None or step < self._last_step:
            return
        self._last_step = int(step)
        self._guarded("log", lambda: self._run.log(values | self._loads(record), step=int(step)))

    def _loads(self, record: Record) -> dict[str, Any]:
        """Returns histograms of the loads in fair shares: of all MoE layers, and of each."""
        loads = expert_load(record)
        if loads is None:
            return {}
        import wandb

        shares = loads * loads.shape[1]
        named = {EXPERT_LOAD: shares.ravel()} | {
            f"{EXPERT_LOAD}/layer_{layer:02d}": row
            for layer, row in enumerate(shares, start=self._first_moe_layer)
        }
        return {
            name: wandb.Histogram(known.tolist())
            for name, values in named.items()
            if len(known := values[np.isfinite(values)])
        }

    def close(self, exit_code: int = 0) -> None:
        """Finishes the W&B run, waiting a bounded time for pending uploads."""
        if self._run is not None:
            self._guarded("finish", lambda: self._run.finish(exit_code=exit_code))
            self._run = None

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            call()
        except KeyboardInterrupt:  # set by a user who wants something else
            raise
        except BaseException as error:  # whatever it is, training matters more
            self._broken = True
            self._run = None
            self._tell(f"W&B could not {what}; continuing without it: {_brief(error)}")

    def _tell(self, text: str) -> None:
        logger.warning("%s", text)
        self._tell_person(text)


def wandb_mode(
    settings: WandbSettings, environ: Mapping[str, str], *, tell: Callable[[str], None]
) -> str:
    """Returns `offline`, `online` or `disabled`: what is set, else what the environment says.

    `tell` is called for each W&B variable that is set and ignored.
    """
    for name, asked in _asked_modes(environ):
        if asked is None:
            tell(f"{name}={environ[name]} in the environment means nothing to W&B: ignored")
        elif settings.mode == "auto":
            return asked
        elif asked != settings.mode:
            tell(
                f"observe.wandb.mode={settings.mode} counts, and not {name}={environ[name]} in the "
                "environment: leave the setting out (auto) for the environment to count"
            )
    if settings.mode != "disabled":
        for name, reason in _OURS.items():
            if environ.get(name):
                tell(f"{name} in the environment is ignored: {reason}")
    return "offline" if settings.mode == "auto" else settings.mode


def _asked_modes(environ: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Yields the variables that request a mode, and the mode; None for an unknown word."""
    if environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        yield "WANDB_DISABLED", "disabled"  # transformers' variable, which users know
    if asked := environ.get("WANDB_MODE", "").strip():
        yield "WANDB_MODE", _MODES.get(asked.lower())


def _start(
    settings: WandbSettings,
    *,
    mode: str,
    run_name: str,
    run_dir: Path,
    config: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Any:
    # Read at import. It also keeps W&B from asking for a key on a terminal, which would wait.
    os.environ.setdefault("WANDB_SILENT", "true")
    if os.environ.get("WANDB_MODE") not in _MODES:
        os.environ.pop("WANDB_MODE", None)  # for which W&B would refuse to start
    import wandb

    (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
    elsewhere = os.environ.get("WANDB_DIR")
    directory = Path(elsewhere).expanduser() if elsewhere else run_dir
    (directory / "wandb").mkdir(parents=True, exist_ok=True)
    run_id, told = wandb_run_id(run_dir)
    if told:
        tell(told)
    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "save_code": False,
        # Otherwise W&B records this process's command line unredacted.
        "x_disable_meta": redacted_arguments(sys.argv) != sys.argv,
        "init_timeout": ONLINE_START_SECONDS,
        "finish_timeout": FINISH_SECONDS,
    }
    known = wandb.Settings.model_fields  # older versions lack some
    arguments: dict[str, Any] = {
        "project": settings.project or os.environ.get("WANDB_PROJECT") or PROJECT,
        "entity": settings.entity,
        "group": settings.group,
        "name": run_name,
        "id": run_id,
        "resume": "allow",
        "reinit": "create_new",  # a sweep trains several runs in one process
        "dir": str(directory),
        "config": dict(config),
        "settings": wandb.Settings(**{k: v for k, v in wanted.items() if k in known}),
    }
    try:
        run = wandb.init(mode=mode, **arguments)  # type: ignore[arg-type]
    except Exception as error:
        if mode != "online":
            raise
        tell(
            f"W&B is not reachable, so its files stay in {directory / 'wandb'} (`wandb sync` sends "
            f"them later): {_brief(error)}"
        )
        wandb.teardown()  # else its service holds the id of the run that did not start
        run = wandb.init(mode="offline", **arguments)
    _define_axes(run)
    return run


def _define_axes(run: Any) -> None:
    run.define_metric("step")
    run.define_metric("train/tokens")
    for family in ("train", "router", "optim", "perf", "memory", "data", "validation"):
        run.define_metric(f"{family}/*", step_metric="train/tokens")
    # Kept, but without a chart each.
    run.define_metric(f"{EXPERT_LOAD}/*", step_metric="train/tokens", hidden=True)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
