"""The words of a command line, prepared for Hydra.

Hydra parses every value by its own grammar: `1.10` becomes 1.1, `83e2010` infinity, and an `=` or
an accent is an error. Here the setting's type decides: a string setting takes the word as typed.
Words are therefore checked before Hydra sees them, and quoted for its grammar if it would read
something else. The words may come in any order, which Hydra's own parser doesn't accept.
"""

import difflib
import re
from argparse import Action
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

from data_pipeline.commands.hydra_private import get_args_parser
from data_pipeline.commands.settings_files import groups_in_defaults
from data_pipeline.commands.settings_tree import (
    did_you_mean,
    entry_type,
    is_dictionary,
    is_settings,
    is_text,
    may_be_null,
    names_in,
    type_at,
    without_none,
)
from data_pipeline.commands.shell import quoted_as_is

_OVERRIDE = re.compile(r"(\+{0,2})([^=+~][^=]*)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_CHOICE = re.compile(r"choice\s*\((.*)\)", re.DOTALL)
_SWEEP = re.compile(r"(?:range|interval|glob|shuffle|sort|tag)\s*\(.*\)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w-]*|0|[1-9][0-9]*", re.ASCII)
_CHOICES = list[str] | None  # of a group
_OPENS, _CLOSES = "([{", ")]}"
# Flags that decide what is composed, not what is done with it.
_COMPOSING = ("config_path", "config_name", "config_dir")


class CommandLineError(HydraException):
    """An invalid word of a command line: the message names it and the form to type."""


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """A checked command line."""

    flags: tuple[tuple[str, tuple[str, ...]], ...]
    """Hydra's flags: what each is for, and its words."""
    overrides: tuple[str, ...]
    """The overrides, as Hydra gets them."""
    typed: dict[str, str] = field(default_factory=dict)
    """What was typed for each override that Hydra gets in another form."""

    @property
    def words(self) -> list[str]:
        """Everything that Hydra gets: flags first, since it accepts none between overrides."""
        return [*(word for _, words in self.flags for word in words), *self.overrides]

    @property
    def is_sweep(self) -> bool:
        """Whether several values of a setting are several runs."""
        return any(meaning == "multirun" for meaning, _ in self.flags) or any(
            override.lower().endswith("hydra.mode=multirun") for override in self.overrides
        )

    @property
    def asks_version(self) -> bool:
        """Whether only the version is asked for: Hydra would print its own."""
        return any(meaning == "version" for meaning, _ in self.flags)

    @property
    def shown_run(self) -> list[str] | None:
        """The words of the run whose configuration `--cfg` shows; None without `--cfg`.

        Hydra itself shows settings that no run would accept.
        """
        shows = any(meaning == "cfg" for meaning, _ in self.flags)
        return [*self.composing_flags, *self.overrides, "hydra.mode=RUN"] if shows else None

    @property
    def composing_flags(self) -> tuple[str, ...]:
        """The words that another command needs to compose from the same files."""
        return tuple(w for meaning, words in self.flags if meaning in _COMPOSING for w in words)

    @property
    def config_dir(self) -> Path | None:
        """The user's folder of configuration files."""
        given = self._given("config_dir")
        return Path(given) if given else None

    @property
    def config_name(self) -> str | None:
        """The file that composing begins with, if it isn't the command's own."""
        return self._given("config_name")

    def _given(self, flag: str) -> str | None:
        given = [words[-1] for meaning, words in self.flags if meaning == flag]
        return re.sub(r"^--?[\w-]+=", "", given[-1]) if given else None


def read_command_line(
    words: Sequence[str], tree: type[Any], *, files: Path | None = None, name: str = ""
) -> CommandLine:
    """Returns a command line for settings of a tree; CommandLineError names an invalid word.

    `files` is the folder of the command's own groups, to which `--config-dir` adds others; `name`
    is the file that composing begins with.
    """
    line = _split(words)
    _require_told_apart(line.overrides, tree)
    # In Hydra's order: a run folder as --config-dir also has a config.yaml, which isn't used.
    folders = [folder for folder in (files, line.config_dir) if folder]
    choices = {group: values for o in line.overrides for group, values in _choices(o, folders)}
    chosen = groups_in_defaults(line.config_name or name, folders, choices)
    groups = _Groups(folders=folders, chosen=chosen)
    given = [_for_hydra(o, tree, groups=groups, swept=line.is_sweep) for o in line.overrides]
    typed = {new: old for new, old in zip(given, line.overrides, strict=True) if new != old}
    return CommandLine(flags=line.flags, overrides=tuple(given), typed=typed)


def values_of(text: str) -> list[str]:
    """Returns the values that a sweep takes from `a,b`, each of which may be quoted.

    `lr=1e-3,wd=0.1` is a single value: a string that lists settings, a common form of run names.
    """
    choice = _CHOICE.fullmatch(text)
    parts = _cut(choice[1] if choice else text)
    is_one = not choice and all("=" in p and not _QUOTED.fullmatch(p.strip()) for p in parts)
    return [text] if is_one else [part.strip() for part in parts]


def as_one_run(override: str) -> str:
    """Returns a word that Hydra made for a run of a sweep, as a command line reads it.

    Hydra escapes what is special to its grammar, but a command line takes a string literally.
    """
    if "\\" not in override:
        return override
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:  # from a third-party sweeper, which may not escape
        return override
    if parsed.is_delete() or parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={_in_quotes(parsed._value)}"


def _in_quotes(value: Any) -> str:
    """Returns a value in which every string that Hydra would escape is quoted instead."""
    if isinstance(value, list):
        return f"[{','.join(map(_in_quotes, value))}]"
    if isinstance(value, dict):
        key = Override._get_value_element_as_str
        return f"{{{','.join(f'{key(k)}:{_in_quotes(part)}' for k, part in value.items())}}}"
    if isinstance(value, QuotedString) or not isinstance(value, str):
        return Override._get_value_element_as_str(value)
    return value if "\\" not in Override._get_value_element_as_str(value) else quoted_as_is(value)


def explained(override: str, tree: type[Any], *, reason: str) -> str:
    """Returns the error for an override outside Hydra's grammar: the form to type."""
    found = _OVERRIDE.fullmatch(override)
    if found is None:
        return f"{override}: not of the form key=value"
    key, text = found[2], found[3]
    kind = without_none(type_at(tree, key))
    if kind is None and not key.startswith("hydra"):
        return f"{key}: there is no such setting{did_you_mean(key, tree)}"
    for known, form in _FORMS.items():
        if kind is known or get_origin(kind) is known:
            return f"{override}: {form.format(key=key)}"
    return f"{override}: {text} can't be read as a value ({reason})"


_FORMS = {
    bool: "must be true or false: type {key}=true",
    int: "must be one whole number: type {key}=NUMBER",
    float: "must be one number: type {key}=NUMBER",
    list: "must be a list: type '{key}=[ONE,OTHER]'",
    tuple: "must be a list: type '{key}=[ONE,OTHER]'",
    dict: "has names with a value each: type {key}.NAME=VALUE for each",
}


def _split(words: Sequence[str]) -> CommandLine:
    """Separates Hydra's flags from overrides, in any order."""
    flags: list[tuple[str, tuple[str, ...]]] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            overrides += rest
            break
        if not word.startswith("-"):
            overrides.append(word)
            continue
        action = _flag(word)
        with_value = action.nargs is None and word in action.option_strings
        may_have_one = action.nargs == "?" and rest and rest[0] in (action.choices or ())
        taken = [rest.pop(0)] if rest and (with_value or may_have_one) else []
        flags.append((action.dest, (word, *taken)))
    return CommandLine(flags=tuple(flags), overrides=tuple(overrides))


def _require_told_apart(overrides: Sequence[str], tree: type[Any]) -> None:
    """Raises CommandLineError if two user-named entries, such as two sources, have one name.

    For any other setting the later value holds, as in Hydra.
    """
    given: dict[str, str] = {}
    for word in overrides:
        found = _OVERRIDE.fullmatch(word)
        key = found[2] if found else ""
        ends = [at for at, sign in enumerate(key) if sign == "."]
        is_named = any(_has_settings_by_name(type_at(tree, key[:end])) for end in ends)
        if is_named and given.setdefault(key, word) != word:
            raise CommandLineError(
                f"{given[key]} and {word}: only one of these values can hold; give one, or "
                "another name to each"
            )


def _has_settings_by_name(kind: Any) -> bool:
    return is_dictionary(kind) and is_settings(get_args(without_none(kind))[1])


def _flag(word: str) -> Action:
    """Returns the Hydra flag that a word is, or abbreviates, as argparse accepts it."""
    known = {name: a for a in get_args_parser()._actions for name in a.option_strings}
    name = word.partition("=")[0]
    if name in known:
        return known[name]
    if name.startswith("--"):
        begun = {known[k].dest: known[k] for k in known if k.startswith(name)}
        if len(begun) == 1:
            return next(iter(begun.values()))
    elif name[:2] in known:  # directly followed by its value or another letter
        return known[name[:2]]
    close = difflib.get_close_matches(name, known, n=1) or ["--help, which names all"]
    raise CommandLineError(f"{word}: there is no such flag; did you mean {close[0]}?")


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """The existing groups of files, each a folder of choices."""

    folders: Sequence[Path]
    chosen: set[str]
    """The groups that have a choice already, so that another choice replaces it."""

    def has(self, group: str) -> bool:
        return _is_group(group, self.folders)

    def plus(self, group: str, given: str) -> str:
        """Returns the prefix of a choice: `model=x` and `+model=x` mean the same to a user."""
        return given.removeprefix("+") if group in self.chosen else given or "+"


def _is_group(group: str, folders: Sequence[Path]) -> bool:
    return any((folder / group).is_dir() for folder in folders)


def _choices(override: str, folders: Sequence[Path]) -> Iterator[tuple[str, list[str]]]:
    """Yields each override's group and choice."""
    found = _OVERRIDE.fullmatch(override)
    if found and _is_group(found[2], folders):
        yield found[2], [value.strip("'\"") for value in values_of(found[3])]


def _for_hydra(word: str, tree: type[Any], *, groups: _Groups, swept: bool) -> str:
    """Returns an override in the form in which Hydra's grammar reads what was typed."""
    found = _OVERRIDE.fullmatch(word)
    if found is None or found[2].startswith(("hydra.", "hydra/")):
        return word
    plus, key, text = found.groups()
    group = key.partition("@")[0]
    if text[:1] != "{" and groups.has(group):
        several = not swept and len(values_of(text)) > 1  # Hydra refuses them
        value = text if several else _value(text, _CHOICES, swept=swept)
        return f"{groups.plus(group, plus)}{key}={value}"
    kind = type_at(tree, key)
    if kind is None:
        return word
    parts = key.split(".")
    leading = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    dictionary = next((path for path in leading if is_dictionary(type_at(tree, path))), None)
    value = _value(text, kind, swept=swept)
    if dictionary is None:
        return f"{plus}{key}={value}"
    # Hydra requires a plus for keys that no file has.
    plus = plus or "++"
    names = key[len(dictionary) + 1 :].split(".") if key != dictionary else []
    if all(_NAME.fullmatch(name) for name in names):
        return f"{plus}{key}={value}"
    if swept:
        raise CommandLineError(f"{word}: with -m, a name of letters is needed here, or a YAML file")
    for name in reversed(names):
        value = f"{{{_key(name)}:{value}}}"
    return f"{plus}{dictionary}={value}"


def _value(text: str, kind: Any, *, swept: bool = False) -> str:
    """Returns the value in Hydra's grammar for the text typed for a setting of a type."""
    if swept and len(values := values_of(text)) > 1:
        return ",".join(_value(value, kind) for value in values)
    if get_origin(without_none(kind)) is list and text.startswith("[") and text.endswith("]"):
        inside = get_args(without_none(kind))[0]
        return f"[{','.join(_value(part.strip(), inside) for part in _cut(text[1:-1]))}]"
    if is_text(kind) or kind is _CHOICES:
        _require_reference(text)
        is_null = may_be_null(kind) and text == "null"
        left = is_null or _QUOTED.fullmatch(text) or (swept and _SWEEP.fullmatch(text))
        return text if left or _reads_as_itself(text) else quoted_as_is(text)
    if (is_dictionary(kind) or names_in(kind)) and text.startswith("{") and text.endswith("}"):
        return f"{{{','.join(_entry(part.strip(), kind) for part in _cut(text[1:-1]))}}}"
    return text


def _require_reference(text: str) -> None:
    """Raises CommandLineError if a `${` begins no valid reference."""
    try:
        if "${" in text:
            parse(text)
    except GrammarParseError:
        raise CommandLineError(
            f"{text}: ${{ begins a reference, such as ${{seed}}: write \\${{ for the two signs"
        ) from None


def _entry(text: str, kind: Any) -> str:
    """Returns one `key:value` of a dictionary."""
    name, colon, value = text.partition(":")
    inside = entry_type(kind, name.strip())
    if not colon or inside is None:
        return text
    key = _key(name.strip()) if is_dictionary(kind) else name.strip()
    return f"{key}:{_value(value.strip(), inside)}"


def _key(name: str) -> str:
    """Returns a user-chosen name; raises CommandLineError if Hydra would read a number in it."""
    parsed = _parsed(f"x={{{name}:0}}")
    if parsed is None or [str(key) for key in parsed] != [name]:
        raise CommandLineError(
            f"{name}: a name that reads as something else can't be given on a command line: use "
            "another, or set it in a YAML file"
        )
    return name


def _reads_as_itself(text: str) -> bool:
    return isinstance(value := _parsed(f"x={text}"), str) and value == text


def _parsed(override: str) -> Any:
    """Returns the value that Hydra reads; None if it is several values, or not of its grammar."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return None
    return None if parsed.is_sweep_override() else parsed.value()


def _cut(text: str) -> list[str]:
    """Returns the parts between commas that are outside quotes and brackets."""
    parts, depth, at = [""], 0, 0
    while at < len(text):
        quoted = _QUOTED.match(text, at) if not parts[-1].strip() or depth else None
        piece = quoted[0] if quoted else text[at]
        depth += (piece in _OPENS) - (piece in _CLOSES)
        if piece == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += piece
        at += len(piece)
    return parts
