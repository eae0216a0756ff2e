"""What a user is told about a setting that can't be: one message, with the nearest that can."""

import difflib
from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """A setting that can't be: the message names the key, the value, the reason and a way out."""

    def __init__(self, key: str, value: object, reason: str) -> None:
        super().__init__(f"{key}={'null' if value is None else value}: {reason}")
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
