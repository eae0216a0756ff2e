"""Markdown in which untrusted text is neither markup nor a secret."""

import re
from collections.abc import Iterable

from data_pipeline import without_secrets


def line(text: str) -> str:
    """Returns untrusted text as one line in which nothing is markup."""
    text = " ".join(without_secrets(text).split())
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns a table; its cells are plain text."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([line(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def fenced(text: str, *, language: str) -> str:
    """Returns text of whole lines as a block of code, whatever fences are in it."""
    text = without_secrets(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"
