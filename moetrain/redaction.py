"""Keeps secrets out of a run's output: configurations, events, logs, messages, W&B.

A secret is known by the name of what holds it (`WANDB_API_KEY`, `password`), by being the value
of an environment variable of such a name, or by its shape. Imports nothing of ours; like `checks`
it may be imported from anywhere.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

REDACTED = "[redacted]"
MIN_VALUE_LENGTH = 8  # a shorter value of an environment variable may occur by chance

_SECRET_WORDS = {
    "token", "secret", "secrets", "password", "passwords", "passwd", "passphrase", "apikey",
    "credential", "credentials", "authorization", "signature", "sig",
}  # fmt: skip
_KEY_OF = {"api", "access", "private", "secret", "signing", "encryption", "account", "auth", "ssh"}
# A name for the place, the kind or the number of secrets isn't a secret itself.
_NO_SECRET = re.compile(
    r"(^|_)(per|num|max|min|each|every)_token$|_(file|path|dir|uri|mode|type|name|ttl|seconds)$"
    r"|^google_application_credentials$"
)
_SHAPES = re.compile(
    r"""
      \b(?:hf|api_org)_[A-Za-z0-9]{30,}\b                     # Hugging Face
    | \bsk-[A-Za-z0-9_-]{20,}                                 # OpenAI, Anthropic
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b                           # AWS
    | \bgh[pousr]_[A-Za-z0-9]{36,}\b | \bgithub_pat_\w{50,}   # GitHub
    | \bglpat-[\w-]{20,} | \bxox[abeoprs]-[\w-]{10,}          # GitLab, Slack
    | \bAIza[\w-]{35} | \bya29\.[\w-]{20,}                    # Google
    | \bwandb_v\d+_\w{20,}                                    # W&B
    | \beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*                  # JSON web tokens
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
_USER_IN_URL = re.compile(r"(?<=://)[^\s/?#@'\"]+(?=@)")
# name=value, name: value, 'name': 'value', and the two words of an HTTP header.
_NAMED = re.compile(
    r"""(?P<name>[A-Za-z][\w./-]*)(?P<is>["']?[ \t]{0,3}[=:][ \t]{0,3})
        (?P<value>"[^"]*" | '[^']*' | \$\{[^}]*\}
                | (?:(?:Bearer|Basic|Token)\s+)? [^\s&'"(){}\[\]]+)""",
    re.VERBOSE,
)


@cache
def is_secret_name(name: str) -> bool:
    """Returns whether a name is that of a secret: `hf_token` is, `num_tokens` isn't."""
    last = re.split(r"[./]", name)[-1]
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", last).replace("-", "_").lower()
    if _NO_SECRET.search(words):
        return False
    parts = words.split("_")
    return not _SECRET_WORDS.isdisjoint(parts) or any(
        first in _KEY_OF and second in ("key", "keys") for first, second in pairwise(parts)
    )


def redacted_text(text: str, *, environ: Mapping[str, str] | None = None) -> str:
    """Returns a text without the secrets in it; `environ` is this process's own unless given."""
    text, shown, at = _without_values(text, environ), "", 0
    while found := _NAMED.search(text, at):
        if _hides(found["name"], found["value"].strip("'\"")):
            quote = found["value"][0] if found["value"][0] in "'\"" else ""
            shown += text[at : found.start("value")] + quote + REDACTED + quote
            at = found.end()
        else:  # the value may contain another name=value
            shown += text[at : found.start("value")]
            at = found.start("value")
    return shown + text[at:]


def redacted(value: Any, *, environ: Mapping[str, str] | None = None) -> Any:
    """Returns nested dictionaries and lists without the secrets in them; numbers are none."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED
            if isinstance(item, str) and item and is_secret_name(str(key))
            else redacted(item, environ=environ)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item, environ=environ) for item in value]
    return redacted_text(value, environ=environ) if isinstance(value, str) else value


def redacted_arguments(arguments: Iterable[str]) -> list[str]:
    """Returns the words of a command line without the secrets in them."""
    shown = []
    for argument in arguments:
        name, is_given, value = argument.partition("=")
        hidden = is_given and value and _hides(name, value)
        shown.append(f"{name}={REDACTED}" if hidden else redacted_text(argument))
    return shown


def holds_secret_value(text: str, *, environ: Mapping[str, str] | None = None) -> bool:
    """Returns whether a text has a secret variable's value in it, or something shaped like one."""
    return _without_values(text, environ) != text


class RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without the secrets in them."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record's text."""
        return redacted_text(super().format(record))


def _without_values(text: str, environ: Mapping[str, str] | None) -> str:
    for value in _secret_values(environ):
        text = text.replace(value, REDACTED)
    return _USER_IN_URL.sub(REDACTED, _SHAPES.sub(REDACTED, text))


def _secret_values(environ: Mapping[str, str] | None) -> list[str]:
    """Returns the values of secret variables, the longest first: one may be a part of another."""
    known = os.environ if environ is None else environ
    values = {value for name, value in known.items() if is_secret_name(name)}
    return sorted((v for v in values if len(v) >= MIN_VALUE_LENGTH), key=len, reverse=True)


def _hides(name: str, value: str) -> bool:
    """Returns whether `name=value` reveals a secret."""
    if not is_secret_name(name) or value in ("", "null", "None", "true", "false"):
        return False
    # What only points to a secret, as Hydra's ${oc.env:NAME} and a shell's $NAME, is none.
    if re.fullmatch(r"['\"]?\$(\w+|\{[\w.:,]+\})['\"]?", value) or value.startswith(REDACTED):
        return False
    is_number = re.fullmatch(r"[-+]?[\d.,]+([eE][-+]?\d+)?[kMBT%]?", value) is not None
    return not (is_number and "token" in name.lower())  # "loss per token: 1.2"
