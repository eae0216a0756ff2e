"""Errors in settings: one message, with the nearest valid value."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moetrain.redaction import REDACTED, holds_secret_value, redacted_arguments, redacted_text


class ConfigError(ValueError):
    """An invalid setting: the message names the key, the value, the reason and a way out."""

    def __init__(self, key: str, value: object, reason: str) -> None:
        given = f"{key}={'null' if value is None else value}"
        super().__init__(redacted_text(f"{redacted_arguments([given])[0]}: {reason}"))
        self.key, self.value, self.reason = key, value, reason

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, object, str]]:
        return type(self), (self.key, self.value, self.reason)  # so that it crosses processes


def nearest(value: str, choices: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` where a choice is close to the value, else an empty text."""
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(*choices: str) -> Callable[[str], str]:
    """Returns a validator that passes the given words and names the nearest for another."""

    def check(value: str) -> str:
        if value not in choices:
            known = ", ".join(choices)
            raise ValueError(f"must be one of {known}{nearest(value, choices)}")
        return value

    return check


def require_no_secrets(arguments: Iterable[str], *, where: str) -> None:
    """Raises ConfigError for a command line with a secret in it, which others would read."""
    arguments = list(arguments)
    for argument, shown in zip(arguments, redacted_arguments(arguments), strict=True):
        if shown != argument:
            name, _, value = shown.partition("=")
            raise ConfigError(
                name,
                value,
                f"is a secret, and {where}: set it as an environment variable and write "
                "'${oc.env:NAME}' here, or leave it out where a library finds it there itself",
            )


def require_no_secret_values(plain: Mapping[str, Any], *, but: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for a setting that is a secret's value and would be used as a text.

    `but` names the settings that may: with all below them, as `cluster.env`.
    """
    for key, value in _leaves(plain):
        if REDACTED in value:
            raise ConfigError(key, value, "stands for a secret, which was not saved: give it again")
        may = any(key == part or key.startswith(f"{part}.") for part in but)
        if not may and holds_secret_value(value):
            raise ConfigError(
                key,
                REDACTED,
                "is or holds a secret, and would be written into the run's files: write what is "
                "meant; secrets are for the environment, or cluster.env",
            )


def _leaves(plain: Any, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(plain, Mapping):
        for key, value in plain.items():
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
    elif isinstance(plain, list | tuple):
        for index, value in enumerate(plain):
            yield from _leaves(value, f"{path}[{index}]")
    elif isinstance(plain, str):
        yield path, plain
