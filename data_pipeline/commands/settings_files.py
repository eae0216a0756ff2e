"""YAML files of settings: read by the types of the settings, with errors by file and line.

A file is what Hydra composes: of a group, an experiment, a `--config-dir`. Owns the errors for
unknown keys and invalid YAML, and that strings are kept as written (`1.10` isn't 1.1). Leaves
composing to Hydra.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, get_args, get_origin

import yaml
from hydra.core.default_element import ResultDefault
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.commands.hydra_private import ConfigLoaderImpl, SourcesRegistry
from data_pipeline.commands.settings_tree import (
    did_you_mean,
    entry_type,
    is_dictionary,
    is_text,
    may_be_null,
    names_in,
    type_at,
    without_none,
)

GLOBAL = "# @package _global_"
_STR = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"


class SettingsFileError(ConfigCompositionException):
    """A file that can't be composed: the message names it, the line and the way out."""


@dataclass(frozen=True, kw_only=True)
class SettingsFile:
    """One file, parsed but not yet interpreted."""

    path: Path
    header: dict[str, str | None]
    root: yaml.Node | None

    def values(self, kind: Any) -> Any:
        """Returns the file's content for a place in the tree with this type (None: no type)."""
        loader = get_yaml_loader()("")
        try:
            return None if self.root is None else loader.construct_document(_typed(self.root, kind))
        except yaml.MarkedYAMLError as error:
            raise SettingsFileError(_said(self.path, error)) from error

    def defaults(self) -> list[Any]:
        """Returns the entries of its defaults list."""
        found = (self.values(None) or {}).get("defaults")
        return found if isinstance(found, list) else []

    def lines(self) -> Iterator[tuple[tuple[str, ...], int, yaml.Node]]:
        """Yields every key with its parent keys, its line, and its value."""
        yield from _lines(self.root, ())


@dataclass
class SettingsFiles:
    """The files that one command composes for the settings of a tree."""

    tree: Any
    read: dict[str, SettingsFile] = field(default_factory=dict)
    """By Hydra's name of each: `experiment/mine`."""
    packages: dict[str, str] = field(default_factory=dict)
    """Where in the tree each file's settings belong."""

    def compose(self, entry: Callable[[], Any]) -> None:
        """Calls Hydra; Hydra's own composition errors are HydraException or OmegaConf's."""
        try:
            with self._composing():
                entry()
        except OmegaConfBaseException:
            raise
        except RecursionError as error:
            raise SettingsFileError(self._circle()) from error
        except (ValueError, TypeError, yaml.YAMLError) as error:  # what Hydra lets through
            raise ConfigCompositionException(" ".join(str(error).split())) from None

    @contextmanager
    def _composing(self) -> Iterator[None]:
        """Makes Hydra read files through this object within the context."""
        Plugins.instance()  # registers the class that reads files, a copy of the module's
        reader: Any = SourcesRegistry.instance().resolve("file")
        load, place = reader.load_config, ConfigLoaderImpl._load_single_config

        def loaded(source: ConfigSource, config_path: str) -> ConfigResult:
            file = read_settings_file(Path(source.path), config_path)
            self.read[config_path.removesuffix(".yaml")] = file
            return ConfigResult(
                config=OmegaConf.create(file.values(None) or {}),
                path=f"{source.scheme()}://{source.path}",
                provider=source.provider,
                header=file.header,
            )

        def placed(loader: ConfigLoaderImpl, default: ResultDefault, repo: Any) -> ConfigResult:
            name = str(default.config_path).removesuffix(".yaml")
            if file := self.read.get(name):
                self.packages[name] = package = default.package or ""
                self._require_known(file, package)
                values = file.values(type_at(self.tree, package)) or {}
                values.pop("defaults", None)
                repo.load_config(default.config_path).config = OmegaConf.create(values)
            return place(loader, default, repo)

        reader.load_config = loaded
        ConfigLoaderImpl._load_single_config = placed  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            reader.load_config = load
            ConfigLoaderImpl._load_single_config = place  # type: ignore[method-assign]

    def place_of(self, name: str, key: str) -> str:
        """Returns the path and line of a key in the file with Hydra's name."""
        file, package = self.read.get(name), self.packages.get(name, "")
        if file is None:
            return name
        lines = {".".join([package, *path]).lstrip("."): line for path, line, _ in file.lines()}
        return f"{file.path}, line {lines[key]}" if key in lines else str(file.path)

    def line_with(self, text: str) -> str:
        """Returns the path and line of the value that contains a text; empty for none."""
        for file in self.read.values():
            for _, line, node in file.lines():
                if not isinstance(node, yaml.MappingNode) and text in yaml.serialize(node):
                    return f"{file.path}, line {line}"
        return ""

    def _require_known(self, file: SettingsFile, package: str) -> None:
        """Raises SettingsFileError for the first key of a file that the tree lacks.

        Also for a single value where there are settings to set.
        """
        if package.partition(".")[0] == "hydra":
            return
        if type_at(self.tree, package) is None:
            raise SettingsFileError(
                f"{file.path}: its settings would be those of {package!r}, which there are none "
                f"of: a file of settings of several groups begins with the line {GLOBAL}"
            )
        for path, line, node in file.lines():
            if path[0] in ("defaults", "hydra"):
                continue
            key = ".".join([package, *path]).lstrip(".")
            known = names_in(type_at(self.tree, key.removesuffix(path[-1]).rstrip(".")))
            if known and path[-1] not in known:
                raise SettingsFileError(
                    f"{file.path}, line {line}: {self._unknown(key, path, package)}"
                )
            if reason := _no_settings(key, node, type_at(self.tree, key)):
                raise SettingsFileError(f"{file.path}, line {line}: {reason}")

    def _unknown(self, key: str, path: tuple[str, ...], package: str) -> str:
        if "." in path[-1] and type_at(self.tree, key):
            nested = path[-1].replace(".", ": {") + ": …" + "}" * path[-1].count(".")
            return f"{key}: a path is for the command line: write {nested} in a file"
        if package and type_at(self.tree, ".".join(path)):
            at = ".".join(path)
            return f"{key}: there is no such setting: to set {at}, begin the file with {GLOBAL}"
        return f"{key}: there is no such setting{did_you_mean(key, self.tree)}"

    def _circle(self) -> str:
        """Returns the error for files whose defaults form a cycle."""
        leads_to = {n: [to for _, to in _defaults(n, file)] for n, file in self.read.items()}
        for name, file in self.read.items():
            if circle := _way_back(name, leads_to):
                return (
                    f"{file.path}: its defaults lead back to itself ({' → '.join(circle)}): take "
                    f"{circle[1]} out of them"
                )
        for name, file in self.read.items():
            group, _, chosen = name.rpartition("/")
            for of, other in _defaults(name, file):
                if group and of == group:  # an existing choice replaces any other
                    return (
                        f"{file.path}: its defaults lead back to itself: {group}={chosen} is "
                        f"chosen, and takes the place of its /{group}: "
                        f"{other.rpartition('/')[2]}: write - {other.rpartition('/')[2]} instead"
                    )
        files = ", ".join(str(file.path) for file in self.read.values())
        return f"the defaults of these files lead back to themselves: {files}"


def read_settings_file(folder: Path, name: str) -> SettingsFile:
    """Returns a file of a folder; raises SettingsFileError if it isn't YAML."""
    path = _shown((folder / f"{name.removesuffix('.yaml')}.yaml").absolute())
    try:
        text = path.read_text(
            encoding="utf-8-sig"
        )  # handles the byte order mark that some editors write
    except FileNotFoundError as error:
        raise ConfigLoadError(f"Config not found : {path}") from error
    except UnicodeDecodeError as error:
        raise SettingsFileError(f"{path}: is not text in UTF-8: save it as UTF-8") from error
    except OSError as error:
        raise SettingsFileError(f"{path}: {error.strerror}") from error
    try:
        root = get_yaml_loader()(text).get_single_node()
    except yaml.YAMLError as error:
        raise SettingsFileError(_said(path, error)) from error
    if isinstance(root, yaml.ScalarNode) and root.tag == _NULL:
        root = None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise SettingsFileError(f"{path}: is not made of lines `key: value`")
    try:
        header = ConfigSource._get_header_dict(_header(text))
    except ValueError as error:
        raise SettingsFileError(f"{path}: {error}") from error
    return SettingsFile(path=path, header=header, root=root)


def _header(text: str) -> str:
    """Returns the header lines of a file, which may stand below a comment."""
    comments = takewhile(lambda line: line.strip()[:1] in ("", "#"), text.splitlines())
    return "\n".join(line for line in comments if re.match(r"\s*#\s*@", line))


def groups_in_defaults(
    name: str, folders: Sequence[Path], given: Mapping[str, Sequence[str]]
) -> set[str]:
    """Returns the groups of which a file, with all files it includes, has a choice.

    `given` are the choices of a command line, which replace those in files.
    """
    choices = {group: list(chosen) for group, chosen in given.items()}
    groups = set[str]()
    names = [name, *(f"{group}/{one}" for group, chosen in given.items() for one in chosen)]
    for one in names:
        folder = next((f for f in folders if (f / f"{one}.yaml").is_file()), None)
        if folder is None:
            continue
        with suppress(SettingsFileError):  # composing reports it
            for group, path in _defaults(one, read_settings_file(folder, one)):
                if group:
                    groups.add(group)
                    choices.setdefault(group, []).append(path.rpartition("/")[2])
                if group not in given:
                    names += [other for other in _filled(path, choices) if other not in names]
    return groups


def _filled(path: str, choices: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the files that a path stands for; it may contain a group's choice."""
    if found := re.search(r"\$\{(\w+)\}", path):
        return [path.replace(found[0], choice) for choice in choices.get(found[1], ())]
    return [path]


def _shown(path: Path) -> Path:
    """Returns a path relative to the working directory, as a user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _typed(node: yaml.Node, kind: Any) -> yaml.Node:
    """Returns a node in which a string setting keeps its value as written."""
    if isinstance(node, yaml.ScalarNode):
        is_number = node.tag not in (_STR, _NULL) and node.style is None and is_text(kind)
        return yaml.ScalarNode(_STR, node.value, node.start_mark) if is_number else node
    if isinstance(node, yaml.MappingNode):
        pairs = []
        for key, value in node.value:
            inside = entry_type(kind, str(key.value))
            new_key = _typed(key, str) if is_dictionary(kind) else key
            if key.value == "defaults" and inside is None:
                inside = list[dict[str, str]]  # choices of groups, which are names of files
            pairs.append((new_key, _typed(value, inside)))
        return yaml.MappingNode(node.tag, pairs, node.start_mark)
    if isinstance(node, yaml.SequenceNode) and get_origin(without_none(kind)) is list:
        inside = get_args(without_none(kind))[0]
        return yaml.SequenceNode(node.tag, [_typed(v, inside) for v in node.value], node.start_mark)
    return node


def _no_settings(key: str, node: yaml.Node, kind: Any) -> str:
    """Returns the error for a single value where the type has settings; empty if it is valid."""
    if not names_in(kind) or isinstance(node, yaml.MappingNode):
        return ""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _NULL:
            said = f"{key}: is empty: write its settings below it, indented, or leave it out"
            return "" if may_be_null(kind) else said
        if "${" in node.value or node.value == "???":
            return ""
    value = node.value if isinstance(node, yaml.ScalarNode) else "[…]"
    first = names_in(kind)[0]
    return f"{key}={value}: has settings of its own: write them below it, as in {first}: …"


def _lines(node: Any, inside: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                path = (*inside, str(key.value))
                yield path, key.start_mark.line + 1, value
                yield from _lines(value, path)


def _said(path: Path, error: yaml.YAMLError) -> str:
    """Returns what is wrong with a file that isn't YAML, and on which line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{path}: {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    line = f", line {mark.line + 1}" if mark else ""
    problem = " ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in problem:
        problem = "a tab, where YAML takes spaces only"
    return f"{path}{line}: not YAML: {problem}"


def _defaults(name: str, file: SettingsFile) -> Iterator[tuple[str, str]]:
    """Yields the names of the files in a file's defaults, each with its group.

    The group is empty if the file itself is named, which no choice can replace.
    """
    beside = PurePosixPath(name).parent
    for entry in file.defaults():
        for key, choice in entry.items() if isinstance(entry, Mapping) else [("", entry)]:
            # `model` of `optional /model@a.b`
            word = str(key).split()[-1].partition("@")[0] if key else ""
            group = str(beside / word).lstrip("/") if word else ""
            for one in choice if isinstance(choice, list) else [choice]:
                yield group, str(beside / word / str(one)).lstrip("/")


def _way_back(start: str, leads_to: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Returns the cycle from a file back to itself."""
    ways = [[start]]
    seen = set[str]()
    while ways:
        way = ways.pop()
        for following in leads_to.get(way[-1], ()):
            if following == start:
                return [*way, start]
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return None
