"""Documents as they are read from a corpus: their text, or why there is none; and the count of it.

Owns the reasons for which something is left out. Leaves to `text_files` and `corpus_files` what
falls under which, and to `corpora` what becomes of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

_NUM_EXAMPLES = 3


class Reason(StrEnum):
    """Why something isn't among the documents of a corpus."""

    not_utf8 = "not_utf8"
    empty = "empty"
    duplicate = "duplicate"
    # What isn't what it should be: a line, a member of a tar, or the rest of a file.
    corrupt = "corrupt"
    # What can't be had: a link that leads nowhere, a folder that may not be listed.
    unreadable = "unreadable"
    # Names that begin with a point.
    hidden = "hidden"
    # A folder that is read under another name.
    read_already = "read_already"
    # Pipes, sockets and devices.
    not_a_file = "not_a_file"
    # A folder of shards that were built.
    shards = "shards"


@dataclass(frozen=True, slots=True)
class Text:
    """A document's text, and where it stands: `a.jsonl, line 3`."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Unread:
    """Something that isn't read: where it is, and why not, as the end of a sentence about it."""

    where: str
    reason: Reason
    why: str


RawDocument = Text | Unread


class LeftOut:
    """How many documents, files and folders of a corpus were left out, by reason, as it is read.

    `num` has the first four reasons always, and others where there was one. `examples` has the
    places of the first few of each.
    """

    def __init__(self) -> None:
        usual = (Reason.not_utf8, Reason.empty, Reason.duplicate, Reason.corrupt)
        self.num: dict[str, int] = dict.fromkeys(usual, 0)
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: Reason, where: str) -> None:
        """Counts what is at a place."""
        self.num[reason] = self.num.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(where)


def left_out_text(num: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> str:
    """The counts in words, each with the places of the first few: `2 empty (a.txt; …)`."""
    parts = []
    for reason, number in num.items():
        named = list(examples.get(reason, ()))
        more = ["…"] if named and number > len(named) else []
        places = f" ({'; '.join(named + more)})" if named else ""
        parts.append(f"{number:,} {reason.replace('_', ' ')}{places}")
    return ", ".join(parts)
