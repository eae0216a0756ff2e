"""Hydra's private parts are as `commands/hydra_private.py` expects them."""

import importlib
import inspect

import pytest
from hydra.core.plugins import Plugins

from data_pipeline.commands import hydra_private as private


@pytest.mark.parametrize("path", [private.BASIC_LAUNCHER, private.BASIC_SWEEPER])
def test_a_class_is_still_where_its_path_says(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert inspect.isclass(getattr(importlib.import_module(module), name))


def test_what_is_replaced_is_still_there() -> None:
    loader = private.ConfigLoaderImpl
    load = loader.load_configuration
    load = getattr(load, "unchecked", load)  # where another test has composed
    assert "config_name" in inspect.signature(load).parameters
    assert list(inspect.signature(loader._load_single_config).parameters) == [
        "self", "default", "repo",
    ]  # fmt: skip
    Plugins.instance()  # which registers it
    assert callable(private.SourcesRegistry.instance().resolve("file").load_config)
    assert private.get_args_parser()._actions
