"""A tree of settings' dataclasses, by path: what kind a setting has, and what else there is.

Owns the question, for command lines and files alike. Leaves values to their readers.
"""

import difflib
import keyword
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def kind_at(tree: Any, path: str) -> Any:
    """Returns the type of the setting at `a.b.c`, None where there is none."""
    kind = tree
    for part in path.split(".") if path else ():
        kind = kind_inside(kind, part)
    return kind


def kind_inside(kind: Any, part: str) -> Any:
    """Returns the type of one entry of settings, a dictionary or a list; None if it has none."""
    kind = bare(kind)
    if is_settings(kind):
        return _kinds(kind).get(part)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is dict:
        return inner[1]
    return inner[0] if origin is list and part.isdecimal() else None


def names_in(kind: Any) -> list[str]:
    """Returns the settings of a part of the tree; none where it has names of the user's own."""
    kind = bare(kind)
    return list(_kinds(kind)) if is_settings(kind) else []


def spelt(field: str) -> str:
    """Returns the setting that a field stands for: `from` for `from_`, a word of Python's own."""
    word = field.removesuffix("_")
    return word if keyword.iskeyword(word) else field


def bare(kind: Any) -> Any:
    """Returns a type without the None that it may be."""
    if get_origin(kind) in (Union, UnionType):
        others = [one for one in get_args(kind) if one is not NoneType]
        return others[0] if len(others) == 1 else kind
    return kind


def may_be_null(kind: Any) -> bool:
    """Returns whether a setting of the type may be null."""
    return get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind)


def is_settings(kind: Any) -> bool:
    """Returns whether a type is a part of a tree, made of settings itself."""
    return is_dataclass(kind)


def is_text(kind: Any) -> bool:
    """Returns whether a setting of the type is a text, one of several words among them."""
    kind = bare(kind)
    return isinstance(kind, type) and issubclass(kind, str | Enum)


def is_dictionary(kind: Any) -> bool:
    """Returns whether a setting of the type has names of the user's own in it."""
    return get_origin(bare(kind)) is dict


def did_you_mean(path: str, tree: Any) -> str:
    """Returns what to say beside a setting that there isn't: the nearest one, or all there are."""
    parent, _, name = path.rpartition(".")
    known = names_in(kind_at(tree, parent))
    elsewhere = [p for p in paths(tree) if p.rpartition(".")[2] == name and p != path]
    close = nearest(name, known) or nearest(elsewhere[0] if elsewhere else "", elsewhere)
    return close or (f"; there are {', '.join(known)}" if known else "")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` where a choice is close to the name, else an empty text."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def plain_reason(message: str) -> str:
    """Returns what pydantic says of a value, in the words of all other messages."""
    return message.removeprefix("Value error, ").replace("Input should ", "must ")


def paths(tree: Any, *, inside: str = "") -> Iterator[str]:
    """Yields the path of every setting of a tree, each part before what is in it."""
    for name, kind in _kinds(bare(tree)).items():
        path = f"{inside}.{name}".lstrip(".")
        yield path
        if is_settings(bare(kind)):
            yield from paths(kind, inside=path)


@cache
def _kinds(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {spelt(known.name): hints[known.name] for known in fields(kind)}
