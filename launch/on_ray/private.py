"""Private parts of Ray: used only here, and checked by a test."""

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
    "keep_signal_handlers",
    "on_loopback",
]

SETUP_HOOK: str = ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR
"""The variable that names the setup hook of Ray's workers."""
MOST_WORKING_DIR_BYTES: int = ray_constants.DASHBOARD_CLIENT_MAX_SIZE


def draining_nodes() -> set[str]:
    """Returns the ids of the nodes that Ray is draining."""
    client: Any = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    return set(client.get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """Returns each node's free resources, by its id."""
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return free


@contextmanager
def on_loopback() -> Iterator[None]:
    """Within the context, a Ray that is started listens on loopback, as Ray does on macOS and
    Windows."""
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Keeps this process's signal handlers while Ray is started.

    Ray first sets a handler for SIGTERM that ends the process at once, and then one below Python's
    that aborts it three seconds later, by an alarm. Ray's child processes keep the signal mask: a
    closed terminal and Slurm signal all processes of a run, and Ray ends with its driver, which
    checkpoints first.
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
