"""Errors for a command line, or a file, that Hydra can't compose.

Owns reading Hydra's and OmegaConf's errors: one message with the setting, its file if any, and a
form that works.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_origin

from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from data_pipeline.commands.command_line import CommandLine, CommandLineError, explained
from data_pipeline.commands.settings_files import SettingsFileError, SettingsFiles
from data_pipeline.commands.settings_tree import (
    did_you_mean,
    is_text,
    names_in,
    nearest,
    type_at,
    without_none,
)
from data_pipeline.commands.shell import text_setting, unquoted


@dataclass(frozen=True, kw_only=True)
class CompositionMessage:
    """The error message for a command line or a file that can't be composed."""

    tree: type[Any]
    line: CommandLine
    files: SettingsFiles
    unknown: Callable[[str], str] | None = None
    """The error message for an unknown setting."""

    def about(self, error: BaseException) -> str:
        """Returns Hydra's chain of errors as one message."""
        chain = [error]
        while following := chain[-1].__cause__ or _inside(chain[-1]):
            chain.append(following)
        if ours := [one for one in chain if isinstance(one, SettingsFileError | CommandLineError)]:
            return str(ours[0])
        inner, said = chain[-1], str(chain[-1])
        if isinstance(inner, OverrideParseException):
            return explained(self._typed(inner.override), self.tree, reason=said.splitlines()[0])
        if several := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", said):
            return self._several(self._typed(several[1]))
        files = [found[1] for one in chain if (found := re.match(r"In '(.+?)': ", str(one)))]
        if isinstance(inner, MissingConfigException):
            return self._missing(inner, files)
        if said.startswith("Additional config directory"):
            return (
                f"--config-dir {self.line.config_dir}: there is no such folder: name the one that "
                "the folders of your groups are in, or leave it out"
            )
        if not isinstance(inner, OmegaConfBaseException):
            return " ".join(said.split())
        key = str(getattr(inner, "full_key", "") or "")
        where = f"{self.files.place_of(files[-1], key)}: " if files else ""
        if isinstance(inner, InterpolationKeyError):
            lost = said.partition("'")[2].partition("'")[0]
            place = self.files.line_with(f"${{{lost}}}")
            where = f"{place}: " if place else ""
        return where + self._value(inner, key)

    def _typed(self, override: str) -> str:
        return self.line.typed.get(override, override)

    def _several(self, override: str) -> str:
        key, _, text = override.lstrip("+").partition("=")
        if get_origin(without_none(type_at(self.tree, key))) in (list, tuple):
            one = f"must be a list: type '{key}=[{text}]'"
        else:
            one = "must be one value"
        return f"{override}: {one}; to run once for each of these, add -m"

    def _missing(self, error: MissingConfigException, files: list[str]) -> str:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        said = f"{group}={name}" if group else name
        given = any(o.lstrip("+") == said for o in self.line.overrides)
        where = f"{self.files.place_of(files[-1], 'defaults')}: " if files and not given else ""
        if other := self._misnamed(f"{group}/{name}".lstrip("/")):
            return f"{where}{said}: {other} is not read: rename it to {name}.yaml"
        if error.options:
            close, known = nearest(name, error.options), ", ".join(error.options)
            return f"{where}{said}: there is no such {group}{close}; {known} are"
        return f"{where}{said}: there is no such file: {name}.yaml of {group or 'the files'}"

    def _misnamed(self, name: str) -> Path | None:
        """Returns the file that a name meant, whose extension Hydra doesn't read."""
        roots = {file.path.parents[known.count("/")] for known, file in self.files.read.items()}
        roots |= {self.line.config_dir} if self.line.config_dir else set()
        paths = (root / f"{name}.yml" for root in sorted(roots))
        return next((path for path in paths if path.is_file()), None)

    def _no_setting(self, path: str, known: list[str]) -> str:
        close = nearest(path.rpartition(".")[2], known) or did_you_mean(path, self.tree)
        choice = next((o for o in self.line.overrides if o.lstrip("+").startswith(f"{path}=")), "")
        if "." in path or not choice or "(" in close:
            return f"{path}: there is no such setting{close}"
        value = choice.partition("=")[2]
        return f"{path}={value}: {no_group(path, value, config_dir=self.line.config_dir)}"

    def _no_reference(self, key: str, name: str) -> str:
        """Returns the error for `${name}` without a setting of that name."""
        reference, close = f"${{{name}}}", did_you_mean(name, self.tree)
        said = f"there is no such setting as {name}{close}"
        given = (self._typed(o).lstrip("+").partition("=") for o in self.line.overrides)
        typed = next(((k, text) for k, _, text in given if reference in text), None)
        if typed is None or (key and typed[0] != key):
            return f"{key}={reference}: {said}" if key else f"{reference}: {said}"
        is_one = not self.line.is_sweep or "," not in typed[1]
        if is_one and is_text(type_at(self.tree, typed[0])):
            said += (
                f"; for these signs themselves type {text_setting(typed[0], unquoted(typed[1]))}"
            )
        return f"{typed[0]}={typed[1]}: {said}"

    def _value(self, error: BaseException, key: str) -> str:
        reason = str(error).splitlines()[0]
        if unknown := re.match(r"Key '(.+?)' (?:is )?not in ", reason):
            kind = getattr(error, "object_type", None)
            known = names_in(kind) if is_dataclass(kind) else []  # also those of a list's elements
            path = key or unknown[1]
            if self.unknown:
                return self.unknown(path)
            return self._no_setting(path, known)
        if lost := re.match(r"Interpolation key '(.+?)' not found", reason):
            return self._no_reference(key, lost[1])
        if " is not a valid bool" in reason:
            return f"{key}={getattr(error, 'value', '') or _quoted(reason)}: must be true or false"
        if "is not Optional" in reason:
            return f"{key}=null: must have a value: give one, or leave it out"
        if single := re.match(r".*: \w+ is not a subclass of \w+\. value: (.*)", reason):
            return f"{key}={single[1]}: has settings of its own: set those, as in {key}.NAME=VALUE"
        converted = re.match(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", reason)
        if converted:
            return f"{key}={converted[1]}: must be of type {converted[2].lower()}"
        if reason.endswith("is not a ListConfig, list or tuple."):
            value = getattr(error, "value", "")
            return f"{key}={value}: must be a list: use '{key}=[{value}]'"
        return f"{key}: {reason}" if key else reason


def no_group(group: str, choice: str, *, config_dir: Path | None) -> str:
    """Returns the error for a choice that is neither of a setting nor of a group of files."""
    said = f"there is no such setting, and no group of files {group!r}"
    if config_dir:
        return f"{said}: {config_dir} has no folder of that name"
    return f"{said}: add --config-dir FOLDER, where FOLDER/{group}/{choice}.yaml is"


def _quoted(reason: str) -> str:
    """Returns the value at the beginning of a reason: `Value 'maybe' is …`."""
    return reason.partition("'")[2].rpartition("'")[0]


def _inside(error: BaseException) -> BaseException | None:
    """Returns the error of which Hydra gives only the name."""
    context = error.__context__
    is_hidden = isinstance(error, ConfigCompositionException) and " raised while" in str(error)
    return context if is_hidden and isinstance(context, OmegaConfBaseException) else None
