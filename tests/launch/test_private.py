"""Ray's private parts are as `launch/on_ray/private.py` expects them.

If an upgrade of Ray has changed one, the name of the failing case says which.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray._raylet import InnerGcsClient  # type: ignore[attr-defined]  # compiled, no types

from launch.on_ray import private


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (ray._private.utils.set_sigterm_handler, 1),
        (private.canonicalize_bootstrap_address, 1),
        (private.find_bootstrap_address, 1),
        (private.get_ray_address_from_environment, 2),
        (ray._private.state.available_resources_per_node, 0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_function_takes_what_it_is_given(function: Callable[..., Any], arguments: int) -> None:
    inspect.signature(function).bind(*[None] * arguments)


def test_what_is_set_is_still_there() -> None:
    assert isinstance(ray._private.ray_constants.ENABLE_RAY_CLUSTER, bool)
    assert private.SETUP_HOOK.startswith("__RAY_WORKER_PROCESS_SETUP_HOOK")
    assert private.MOST_WORKING_DIR_BYTES > 2**20
    assert "worker.gcs_client = " in inspect.getsource(ray._private.worker.connect)
    assert callable(InnerGcsClient.get_draining_nodes)
    tokens = private.AuthenticationTokenLoader.instance()
    for name in ("has_token", "get_raw_token", "reset_cache"):
        assert callable(getattr(tokens, name)), name
    assert callable(private.Config.initialize)


def test_ray_listens_elsewhere_only_while_it_is_told() -> None:
    before = ray._private.ray_constants.ENABLE_RAY_CLUSTER
    with private.on_loopback():
        assert ray._private.ray_constants.ENABLE_RAY_CLUSTER is False
    assert ray._private.ray_constants.ENABLE_RAY_CLUSTER is before
