"""Quotes printed commands, so that a shell and the command line read back what was meant.

A printed command has two readers. `shlex` quotes for the shell. The command line then takes a
string setting literally, except for a few forms with a meaning of their own: these are quoted.
"""

import io
import re
import shlex
import sys
from collections.abc import Iterable

_SETTING = re.compile(r"([\w./@+-]+)=(.*)", re.ASCII | re.DOTALL)
# Null, a quoted string, a reference, and what `-m` would take for several values.
_MEANS_SOMETHING = re.compile(r"null|(['\"]).*\1|.*\$\{.*", re.DOTALL)
_MAY_BE_SEVERAL = re.compile(r".*,.*|\w+\(.*\)", re.DOTALL)


def escape_output() -> None:
    """Makes standard output accept any name, as standard error does: what isn't UTF-8 is
    escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def shell_command(words: Iterable[str]) -> str:
    """Returns a command of these words, quoted for a shell."""
    return " ".join(map(shell_word, words))


def shell_word(word: str) -> str:
    """Returns one word quoted for a shell; of `key=value` only the value is quoted."""
    setting = _SETTING.fullmatch(word)
    if setting is None:
        return shlex.quote(word)
    return f"{setting[1]}={shlex.quote(setting[2]) if setting[2] else ''}"


def text_setting(key: str, text: str, *, swept: bool = False) -> str:
    """Returns the word that sets a string, quoted for a shell: `run.name='essai été'`.

    `swept` if the same line may have `-m`, for which a comma separates values.
    """
    return shell_word(f"{key}={as_typed(text, swept=swept)}")


def as_typed(text: str, *, swept: bool = False) -> str:
    """Returns what to type for a string: itself, or quoted if it would mean something else."""
    several = swept and _MAY_BE_SEVERAL.fullmatch(text)
    return quoted(text) if several or _MEANS_SOMETHING.fullmatch(text) else text


def quoted(text: str) -> str:
    """Returns a string quoted for Hydra's grammar, without special meaning for any character."""
    return quoted_as_is(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def quoted_as_is(text: str) -> str:
    """Returns a string quoted for Hydra's grammar, in which only `${…}` keeps its meaning."""
    # The grammar reads backslashes only before a quote, which includes the one at the end.
    return '"' + re.sub(r'(\\*)("|\Z)', _escaped, text) + '"'


def unquoted(text: str) -> str:
    """Returns the string inside such quotes; any other value unchanged."""
    found = re.fullmatch(r'"(.*)"', text, re.DOTALL)
    if found is None:
        return text
    return re.sub(r'(\\+)("|\Z)', lambda m: m[1][: len(m[1]) // 2] + m[2], found[1])


def _escaped(found: re.Match[str]) -> str:
    return found[1] * 2 + (r"\"" if found[2] else "")
