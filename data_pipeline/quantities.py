"""Durations, sizes and counts for people. Records hold the exact figures instead."""

import math

from rich.filesize import decimal

_BINARY = ((2**10, " KiB"), (2**20, " MiB"), (2**30, " GiB"), (2**40, " TiB"))


def duration(seconds: float, *, whole: bool = False) -> str:
    """Returns a time in its two largest units: `9.4 s`, `1 min 10 s`, `3 h 5 min`, `2 d 4 h`.

    With `whole`, for a countdown, without tenths of seconds.
    """
    if whole:
        seconds = max(round(seconds), 0)
    if seconds < 59.95:
        return f"{seconds:.0f} s" if whole else f"{seconds:.1f} s"
    for size, unit, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if seconds >= size - below / 2:
            many, rest = divmod(round(seconds / below), size // below)
            return f"{many:,} {unit} {rest} {part}"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def rounded_duration(seconds: float) -> str:
    """Returns a time with three significant digits in one unit, for estimates: `1.57 h`."""
    for unit, size, below in (("s", 1, 600), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < below:
            return f"{seconds / size:.3g} {unit}"
    days = seconds / 86_400
    return f"{days:.3g} days" if days < 1000 else f"{days:,.0f} days"


def decimal_size(num_bytes: float) -> str:
    """Returns the size of files or texts in powers of 1000: `999 bytes`, `12.1 MB`."""
    return decimal(round(num_bytes))


def binary_size(num_bytes: float) -> str:
    """Returns the size of memory, or of a limit in MiB or GiB: `0.25 KiB`, `1.5 GiB`."""
    return _scaled(num_bytes, _BINARY)


def count(number: float, *, billion: str = "B") -> str:
    """Returns a number with three digits and a letter for its scale: `950`, `12.3 k`, `46.7 B`."""
    return _scaled(number, ((1, ""), (1e3, " k"), (1e6, " M"), (1e9, f" {billion}"), (1e12, " T")))


def _scaled(number: float, units: tuple[tuple[float, str], ...]) -> str:
    """Returns three significant digits in the first unit with at most three integer digits."""
    for factor, unit in units:
        if abs(number) / factor < 999.5 or not math.isfinite(number):
            return f"{number / factor:.3g}{unit}"
    factor, unit = units[-1]
    return f"{number / factor:,.0f}{unit}"
