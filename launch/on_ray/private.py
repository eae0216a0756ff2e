"""Parts of Ray that it doesn't promise to keep: used here alone, and watched by a test."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray._private.ray_constants as ray_constants
from ray._private.services import (
    canonicalize_bootstrap_address,
    find_bootstrap_address,
    get_ray_address_from_environment,
)
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

__all__ = [
    "MOST_WORKING_DIR_BYTES",
    "SETUP_HOOK",
    "AuthenticationTokenLoader",
    "Config",
    "canonicalize_bootstrap_address",
    "draining_nodes",
    "find_bootstrap_address",
    "free_resources",
    "get_ray_address_from_environment",
    "on_loopback",
    "own_signals",
]

SETUP_HOOK: str = ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR
"""The variable that names what Ray's workers call first."""
MOST_WORKING_DIR_BYTES: int = ray_constants.DASHBOARD_CLIENT_MAX_SIZE


def draining_nodes() -> set[str]:
    """Returns the ids of the nodes that Ray empties now."""
    client: Any = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    return set(client.get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """Returns what each node has to give, by its id."""
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return free


@contextmanager
def on_loopback() -> Iterator[None]:
    """Has a Ray that is started meanwhile listen on loopback, as Ray does on macOS and Windows."""
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def own_signals() -> Iterator[None]:
    """Keeps this process's own handlers of signals while Ray is started.

    Ray first sets one for SIGTERM that ends the process at once, and then one below Python's, which
    aborts it three seconds after it was called, by an alarm. What Ray starts meanwhile keeps the
    mask of signals: a closed terminal and Slurm signal all processes of a run, and it ends with
    its driver, which saves first.
    """
    utils: Any = ray._private.utils
    rays, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        utils.set_sigterm_handler = rays
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.alarm(0)
