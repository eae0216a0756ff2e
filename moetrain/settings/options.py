"""The options of registered things, as parts of the tree of settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from moetrain.checks import nearest
from moetrain.registries import Registry


def checked_options(
    registry: Registry[Any], name: str | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the options of the one thing that a setting names, with their defaults.

    Raises ValueError for an unknown option or an invalid value. `name` is None where the name
    itself is wrong, which is reported first.
    """
    return dict(given) if name is None else registry.checked_options(name, given)


def known_names(registry: Registry[Any], names: Sequence[str]) -> list[str]:
    """Returns the names of several things of a kind; ValueError for an unknown or repeated one."""
    for name in names:
        registry.known(name)
        if names.count(name) > 1:
            raise ValueError(f"{registry.kind} {name!r} is named twice")
    return list(names)


def checked_options_by_name(
    registry: Registry[Any], names: Sequence[str] | None, given: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns the options of several things, by their names, with their defaults."""
    if names is None:
        return {name: dict(options) for name, options in given.items()}
    for name in given:
        if name not in names:
            raise ValueError(f"{name!r} is not in {registry.setting}{nearest(name, names)}")
    checked = {name: registry.checked_options(name, given.get(name, {})) for name in names}
    return {name: options for name, options in checked.items() if options}
