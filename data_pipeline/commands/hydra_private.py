"""Private parts of Hydra: used only here, and checked by a test."""

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import get_args_parser

__all__ = [
    "BASIC_LAUNCHER",
    "BASIC_SWEEPER",
    "ConfigLoaderImpl",
    "SourcesRegistry",
    "get_args_parser",
]

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
