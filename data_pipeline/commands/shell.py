"""Commands as messages print them: a shell and the command line read back what was meant.

Two readers stand between a printed command and a setting. The shell is served by `shlex`. The
command line then takes the text of a setting as it stands, but for the few forms that mean
something to it: these are put into quotes of their own.
"""

import io
import re
import shlex
import sys
from collections.abc import Iterable

_SETTING = re.compile(r"([\w./@+-]+)=(.*)", re.ASCII | re.DOTALL)
# Null, a text in quotes, a reference, and whatever `-m` would take for several values.
_MEANS_SOMETHING = re.compile(r"null|(['\"]).*\1|.*\$\{.*", re.DOTALL)
_MAY_BE_SEVERAL = re.compile(r".*,.*|\w+\(.*\)", re.DOTALL)


def escape_output() -> None:
    """Has standard output take any name, as standard error does: what isn't UTF-8 is escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def shell_command(words: Iterable[str]) -> str:
    """Returns a command of these words, as a shell takes it."""
    return " ".join(map(shell_word, words))


def shell_word(word: str) -> str:
    """Returns one word as a shell takes it; of `key=value` only the value stands in quotes."""
    setting = _SETTING.fullmatch(word)
    if setting is None:
        return shlex.quote(word)
    return f"{setting[1]}={shlex.quote(setting[2]) if setting[2] else ''}"


def text_setting(key: str, text: str, *, swept: bool = False) -> str:
    """Returns the word that gives a setting a text, as a shell takes it: `run.name='essai été'`.

    `swept` where `-m` may stand on the same line, to which a comma means several values.
    """
    return shell_word(f"{key}={as_typed(text, swept=swept)}")


def as_typed(text: str, *, swept: bool = False) -> str:
    """Returns what is typed for a text: itself, or in quotes where it would mean something."""
    several = swept and _MAY_BE_SEVERAL.fullmatch(text)
    return quoted(text) if several or _MEANS_SOMETHING.fullmatch(text) else text


def quoted(text: str) -> str:
    """Returns a text in the quotes of Hydra's grammar, with nothing in it that means anything."""
    return quoted_as_is(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def quoted_as_is(text: str) -> str:
    """Returns a text in the quotes of Hydra's grammar, of which only `${…}` keeps its meaning."""
    # Of backslashes, the grammar reads only those before a quote, and the text's end is one.
    return '"' + re.sub(r'(\\*)("|\Z)', _escaped, text) + '"'


def unquoted(text: str) -> str:
    """Returns the text of a value that stands in such quotes; any other value as it is."""
    found = re.fullmatch(r'"(.*)"', text, re.DOTALL)
    if found is None:
        return text
    return re.sub(r'(\\+)("|\Z)', lambda m: m[1][: len(m[1]) // 2] + m[2], found[1])


def _escaped(found: re.Match[str]) -> str:
    return found[1] * 2 + (r"\"" if found[2] else "")
