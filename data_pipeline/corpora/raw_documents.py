"""Documents as they are read from a corpus: their text, or why there is none; and their counts.

Owns the reasons for which something is left out. Leaves deciding which applies to `text_files` and
`corpus_files`, and the consequences to `corpora`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_NUM_EXAMPLES = 3
_FIELDS = ("num", "examples", "why", "unknown_endings", "ending_examples")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")


class Reason(StrEnum):
    """Why something isn't among the documents of a corpus."""

    not_utf8 = "not_utf8"
    empty = "empty"
    duplicate = "duplicate"
    # Corrupt: a line, a member of a tar, or the rest of a file.
    corrupt = "corrupt"
    # Inaccessible: a link without a target, a folder that can't be listed.
    unreadable = "unreadable"
    # A single JSON object in its file, such as one with a picture's size.
    no_text = "no_text"
    # An unknown suffix, of something that isn't text.
    unknown_ending = "unknown_ending"
    # Names that begin with a dot.
    hidden = "hidden"
    # A folder that is read under another name, or a file that is a pointer to one that is read.
    read_already = "read_already"
    # Pipes, sockets and devices.
    not_a_file = "not_a_file"
    # A folder that this program wrote: shards, or a run.
    output = "output"


# What ends the reading of a corpus, unless it is to be skipped and counted.
FAILURES = (Reason.corrupt, Reason.unreadable)


@dataclass(frozen=True, slots=True)
class Text:
    """A document's text, and its location: `a.jsonl, line 3`.

    `unknown_ending` is its file's suffix, if that is unknown and the file was read as plain text.
    """

    where: str
    text: str
    unknown_ending: str = ""


@dataclass(frozen=True, slots=True)
class Unread:
    """Something that isn't read: its location, and why not, as the end of a sentence about it.

    `way_out` says what to do about it, other than leaving it out.
    """

    where: str
    reason: Reason
    why: str
    way_out: str = "repair it"


RawDocument = Text | Unread


class LeftOut:
    """What of a corpus was left out, counted as it is read: by reason, with the first places.

    `num` always has the first four reasons, and others that occurred. `examples` has the places of
    the first few of each, with the existing fields of the first one without a text. `why` says of
    the first what is wrong and what to do.

    `unknown_endings` has the number of documents that were read as plain text, by their unknown
    suffix, and `ending_examples` the places of the first few.
    """

    def __init__(self) -> None:
        usual = (Reason.not_utf8, Reason.empty, Reason.duplicate, Reason.corrupt)
        self.num: dict[str, int] = dict.fromkeys(usual, 0)
        self.examples: dict[str, list[str]] = {}
        self.why: dict[str, str] = {}
        self.unknown_endings: dict[str, int] = {}
        self.ending_examples: dict[str, list[str]] = {}

    def add(self, reason: Reason, where: str, why: str = "") -> None:
        """Counts something at a place as left out."""
        self.why.setdefault(reason, shown(f"{where} {why}"))
        # Their text may be in a different field: the first one lists its fields.
        is_told = reason is Reason.no_text and reason not in self.examples
        _count(self.num, self.examples, reason, f"{where} {why}" if is_told else where)

    def add_unknown_ending(self, ending: str, where: str) -> None:
        """Counts a document that is read as plain text."""
        _count(self.unknown_endings, self.ending_examples, shown(ending), where)

    def record(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {name: getattr(self, name) for name in _FIELDS}

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Adds what was left out of the next part of the corpus, as its `record()`."""
        for num, examples in (("num", "examples"), ("unknown_endings", "ending_examples")):
            for key, number in record[num].items():
                ours: dict[str, int] = getattr(self, num)
                ours[key] = ours.get(key, 0) + number
            for key, places in record[examples].items():
                named: list[str] = getattr(self, examples).setdefault(key, [])
                named += places[: _NUM_EXAMPLES - len(named)]
        for reason, why in record["why"].items():
            self.why.setdefault(reason, why)


def _count(num: dict[str, int], examples: dict[str, list[str]], key: str, where: str) -> None:
    num[key] = num.get(key, 0) + 1
    named = examples.setdefault(key, [])
    if len(named) < _NUM_EXAMPLES:
        named.append(shown(where))


def counts_text(num: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> str:
    """Counts in words, each with the places of the first few: `2 empty (a.txt; b.txt)`."""
    parts = []
    for reason, number in num.items():
        named = list(examples.get(reason, ()))
        more = ["…"] if named and number > len(named) else []
        places = f" ({'; '.join(named + more)})" if named else ""
        parts.append(f"{number:,} {reason.replace('_', ' ')}{places}")
    return ", ".join(parts)


def reading_report(source: Mapping[str, Any]) -> str:
    """What of a source was left out or read as plain text, from the values of its fields."""
    report = f"left out: {counts_text(source['num_left_out'], source['left_out_examples'])}"
    if source["unknown_endings"]:
        endings = counts_text(source["unknown_endings"], source["ending_examples"])
        report += f"; read as plain text, their endings not being known: {endings}"
    return report


def as_utf8(text: str) -> str:
    """A text that UTF-8 can encode: a byte of a file name that isn't UTF-8 becomes `\\xe9`."""
    return _NOT_UTF8.sub(lambda found: _escaped(found[0]), text)


def shown(text: str) -> str:
    """A name that UTF-8 can encode and one line can show: unprintable characters are escaped."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else _escaped(sign) for sign in text)


def _escaped(sign: str) -> str:
    if "\udc80" <= sign <= "\udcff":  # how Python represents such a byte
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode("ascii")
