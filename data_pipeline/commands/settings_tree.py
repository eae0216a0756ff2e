"""A tree of settings dataclasses, by path: each setting's type, and the existing names.

Owns these questions for command lines and files alike. Leaves values to their readers.
"""

import difflib
import keyword
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def type_at(tree: Any, path: str) -> Any:
    """Returns the type of the setting at `a.b.c`, None if there is none."""
    kind = tree
    for part in path.split(".") if path else ():
        kind = entry_type(kind, part)
    return kind


def entry_type(kind: Any, part: str) -> Any:
    """Returns the type of one entry of settings, a dictionary or a list; None if it has none."""
    kind = without_none(kind)
    if is_settings(kind):
        return _kinds(kind).get(part)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is dict:
        return inner[1]
    return inner[0] if origin is list and part.isdecimal() else None


def names_in(kind: Any) -> list[str]:
    """Returns the settings of a part of the tree; none if its names are the user's."""
    kind = without_none(kind)
    return list(_kinds(kind)) if is_settings(kind) else []


def setting_name(field: str) -> str:
    """Returns the setting of a field: `from` for `from_`, a Python keyword."""
    word = field.removesuffix("_")
    return word if keyword.iskeyword(word) else field


def without_none(kind: Any) -> Any:
    """Returns a type without its optional None."""
    if get_origin(kind) in (Union, UnionType):
        others = [one for one in get_args(kind) if one is not NoneType]
        return others[0] if len(others) == 1 else kind
    return kind


def may_be_null(kind: Any) -> bool:
    """Returns whether a setting of the type may be null."""
    return get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind)


def is_settings(kind: Any) -> bool:
    """Returns whether a type is a part of a tree, with settings of its own."""
    return is_dataclass(kind)


def is_text(kind: Any) -> bool:
    """Returns whether a setting of the type is a string, including a choice of words."""
    kind = without_none(kind)
    return isinstance(kind, type) and issubclass(kind, str | Enum)


def is_dictionary(kind: Any) -> bool:
    """Returns whether a setting of the type has user-chosen names."""
    return get_origin(without_none(kind)) is dict


def did_you_mean(path: str, tree: Any) -> str:
    """Returns a suggestion for an unknown setting: the nearest name, or all names."""
    parent, _, name = path.rpartition(".")
    known = names_in(type_at(tree, parent))
    elsewhere = [p for p in paths(tree) if p.rpartition(".")[2] == name and p != path]
    close = nearest(name, known) or nearest(elsewhere[0] if elsewhere else "", elsewhere)
    return close or (f"; there are {', '.join(known)}" if known else "")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` if a choice is close to the name, else an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def plain_reason(message: str) -> str:
    """Returns pydantic's error for a value, worded like all other messages."""
    return message.removeprefix("Value error, ").replace("Input should ", "must ")


def paths(tree: Any, *, inside: str = "") -> Iterator[str]:
    """Yields the path of every setting of a tree, each part before its content."""
    for name, kind in _kinds(without_none(tree)).items():
        path = f"{inside}.{name}".lstrip(".")
        yield path
        if is_settings(without_none(kind)):
            yield from paths(kind, inside=path)


@cache
def _kinds(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {setting_name(known.name): hints[known.name] for known in fields(kind)}
