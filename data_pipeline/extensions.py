"""What a user's own code adds by name: registries, and the modules that fill them.

A setting names one thing of a kind: an optimizer, a tokenizer. Those of the project and those of a
user's module are in the same registry. Modules are imported because a user names them
(`extensions=[my_lab.routers]`) or has installed a package that offers them as entry points of the
group `moetrain.extensions`; never because a checkpoint names them.
"""

import difflib
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

GROUP = "moetrain.extensions"
OWN_PACKAGES = ("moetrain", "launch", "data_pipeline")

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Registered(Generic[Made]):
    """One thing that a setting can name."""

    name: str
    made: Made
    """The registered class or function."""
    options: type | None
    """The dataclass of its own settings; None if it has none."""
    module: str
    """The module that registered it."""


class Registry(Generic[Made]):
    """The things of one kind, by name: the built-in ones and those of extensions."""

    def __init__(self, kind: str, *, setting: str, built_in: Mapping[str, str]) -> None:
        """`built_in` maps the names that need no extension to the modules that register them.

        A module is imported when its thing is used: checking a setting doesn't need it.
        """
        self.kind, self.setting = kind, setting
        self._built_in = dict(built_in)
        self._found: dict[str, Registered[Made]] = {}

    def register(self, name: str, *, options: type | None = None) -> Callable[[Made], Made]:
        """Returns a decorator that registers a class or function by a name.

        `options` is a dataclass of its own settings. Raises ValueError if the name is taken.
        """
        if options is not None and not is_dataclass(options):
            raise ValueError(f"{self.kind} {name!r}: options={options!r} must be a dataclass")

        def add(made: Made) -> Made:
            module = getattr(made, "__module__", "")
            self._require_free(name, made, module)
            self._found[name] = Registered(name=name, made=made, options=options, module=module)
            return made

        return add

    def names(self) -> list[str]:
        """Returns the registered names, the built-in ones first."""
        return list(dict.fromkeys([*self._built_in, *self._found]))

    def known(self, name: str) -> str:
        """Returns the name; raises ValueError if it isn't registered. Validates a setting."""
        if name not in self._built_in and name not in self._found:
            close = difflib.get_close_matches(name, self.names(), n=1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"must be one of {', '.join(self.names())}{meant}; one of your own is "
                "registered by a module named in extensions=[…] (docs/extending.md)"
            )
        return name

    def get(self, name: str) -> Registered[Made]:
        """Returns what a name is registered for; raises ValueError if it isn't registered."""
        self.known(name)
        if name not in self._found:
            import_module(self._built_in[name])
        return self._found[name]

    def checked_options(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a thing's own settings with their defaults; ValueError for invalid ones."""
        if name in self._built_in and not given:
            return {}  # without importing its module
        options = self.get(name).options
        if options is None:
            if given:
                raise ValueError(
                    f"{self.kind} {name!r} has no options, and was given {_list(given)}"
                )
            return {}
        return asdict(self._typed(name, options, given))

    def typed_options(self, name: str, given: Mapping[str, Any]) -> Any:
        """Returns a thing's own settings as its dataclass; None if it has none."""
        options = self.get(name).options
        return None if options is None else self._typed(name, options, given)

    def default_options(self, name: str) -> dict[str, Any]:
        """Returns the defaults of a thing's own settings, those that have one.

        Empty if the name isn't registered, which is reported when the name is checked.
        """
        if name not in self._found or (options := self._found[name].options) is None:
            return {}
        made: dict[str, Any] = {}
        for known in fields(options):
            if known.default is not MISSING:
                made[known.name] = known.default
            elif known.default_factory is not MISSING:
                made[known.name] = known.default_factory()
        return made

    def module_of(self, name: str) -> str | None:
        """Returns the module of an extension's thing; None for a built-in one."""
        return None if name in self._built_in else self.get(name).module

    def _typed(self, name: str, options: type, given: Mapping[str, Any]) -> Any:
        known = [field.name for field in fields(options)]
        for key in given:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                meant = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(
                    f"{self.kind} {name!r} has no option {key!r}{meant}; it has {_list(known)}"
                )
        try:
            return TypeAdapter(options).validate_python(dict(given))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            value = "" if first["type"].startswith("missing") else f"={first['input']!r}"
            reason = first["msg"].removeprefix("Value error, ").replace("Input should ", "must ")
            raise ValueError(f"{self.kind} {name!r}, option {where}{value}: {reason}") from None

    def _require_free(self, name: str, made: Made, module: str) -> None:
        owner = self._built_in.get(name)
        before = self._found.get(name)
        if owner is not None and module.partition(".")[0] not in OWN_PACKAGES:
            raise ValueError(f"{self.kind} {name!r} is built in: give yours another name")
        same = before is not None and _qualified(before.made) == _qualified(made)
        if before is not None and not same:
            raise ValueError(
                f"{self.kind} {name!r} is registered by {before.module} already: give the one of "
                f"{module} another name"
            )


def _qualified(made: object) -> tuple[str, str]:
    # A notebook's cell that runs twice registers the same thing again.
    return getattr(made, "__module__", ""), getattr(made, "__qualname__", repr(made))


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def load_extensions(names: Iterable[str]) -> list[str]:
    """Imports the modules that a user names; returns their full names without duplicates.

    A name is a module's (`my_lab.routers`), found on Python's path or in the working directory, or
    an entry point's. Raises ValueError if it doesn't exist or its import fails.
    """
    return list(dict.fromkeys(_load(name) for name in names))


def load_installed() -> list[str]:
    """Imports the extensions that installed packages offer as entry points; returns their names.

    Raises ValueError if an import fails: a run would otherwise depend on what could be imported.
    """
    loaded: list[str] = []
    for name, module in sorted(_entry_points().items()):
        try:
            loaded += load_extensions([module])
        except ValueError as error:
            raise ValueError(
                f"an installed package offers the extension {name}, and {error}: mend or uninstall "
                "it"
            ) from None
    return list(dict.fromkeys(loaded))


def _load(name: str) -> str:
    module = _entry_points().get(name, name)
    if module in sys.modules:
        return module
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that nothing there shadows an installed package
    try:
        import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and module.startswith(f"{error.name}"):
            offered = _list(sorted(_entry_points()))
            raise ValueError(
                f"there is no module {module} (looked for as Python does, and in {here}), and no "
                f"installed package offers an extension of that name (offered: {offered}): install "
                "it, or run where it lies"
            ) from None
        raise ValueError(f"importing {module} failed: {type(error).__name__}: {error}") from error
    return module


@cache
def _entry_points() -> Mapping[str, str]:
    """Returns the modules that installed packages offer, by their entry points' names."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


def load_recorded(sources: Mapping[str, str], *, where: str) -> None:
    """Imports a run's extensions in one of its processes, and checks that they are unchanged.

    `sources` has `source_of` each module. Raises ValueError, whose message names `where`, if one is
    missing or its source differs from the one that the run began with.
    """
    try:
        load_extensions(sources)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for module, recorded in sources.items():
        if (found := source_of(module)) != recorded:
            raise ValueError(
                f"{where}: the extension {module} has another source here than where the run was "
                f"started ({found} instead of {recorded}): copy the same files to every machine"
            )


def source_of(module: str) -> str:
    """Returns the version and SHA-256 of a loaded extension: `0.3 sha256:1f…`.

    The hash covers the source of the module and of the modules of its package that it imported.
    """
    package = module.partition(".")[0]
    own = {n: m for n, m in sys.modules.items() if n == package or n.startswith(f"{package}.")}
    digest = hashlib.sha256()
    for name in sorted(own):
        if (source := _source(own[name])) is not None:
            digest.update(f"{name}\0{len(source)}\0".encode() + source)
    distributions = packages_distributions().get(package)
    number = f"{version(distributions[0])} " if distributions else ""
    return f"{number}sha256:{digest.hexdigest()}"


def _source(module: ModuleType) -> bytes | None:
    file = getattr(module, "__file__", None)
    return Path(file).read_bytes() if file and Path(file).is_file() else None
