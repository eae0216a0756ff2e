"""Turns a plain dictionary into a typed tree of settings, or reports the first error in it."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from data_pipeline.commands.settings_tree import plain_reason, setting_name
from moetrain.checks import ConfigError, nearest
from moetrain.settings.resolved import Resolved

Tree = TypeVar("Tree")


def validated(values: Mapping[str, Any], tree: type[Tree]) -> Tree:
    """Returns the typed tree of a plain dictionary; ConfigError names the first error."""
    try:
        return TypeAdapter(tree).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        reason = plain_reason(first["msg"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = known_keys(tree, path[:-1])
            reason = unknown_setting(path[-1], known)
        value = "(missing)" if first["type"].startswith("missing") else first["input"]
        raise ConfigError(".".join(map(setting_name, path)), value, reason) from None


@contextmanager
def asking_for_extensions(config: Mapping[str, Any]) -> Iterator[None]:
    """Adds to a ConfigError about a checkpoint's configuration the extensions that it needs.

    They aren't imported, because only the user may name modules to import.
    """
    try:
        yield
    except ConfigError as error:
        modules = config.get("run", {}).get("extensions")
        if not modules:
            raise
        raise ConfigError(
            error.key,
            error.value,
            f"{error.reason}. The run was trained with extensions=[{','.join(modules)}]: give that "
            "(in Python, import it) if you trust the code",
        ) from None


def validated_run(config: Mapping[str, Any]) -> Resolved:
    """Returns the configuration in a checkpoint; ConfigError names what is wrong."""
    with asking_for_extensions(config):
        return validated(config, Resolved)


def unknown_setting(name: str, known: list[str]) -> str:
    """Returns the hint for an unknown setting: the nearest one, or all known ones."""
    return f"there is no such setting{nearest(name, known) or '; there are ' + ', '.join(known)}"


def known_keys(tree: type, path: list[str]) -> list[str]:
    """Returns the settings of a part of the tree; empty where the path doesn't exist."""
    for part in path:
        types = {f.name: f.type for f in dataclasses.fields(tree)}
        if not dataclasses.is_dataclass(types.get(part)):
            return []
        tree = types[part]  # type: ignore[assignment]
    return [f.name for f in dataclasses.fields(tree)]
