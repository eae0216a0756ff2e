"""Documents as they are read from a corpus: their text, or why there is none; and the count of it.

Owns the reasons for which something is left out. Leaves to `text_files` and `corpus_files` what
falls under which, and to `corpora` what becomes of it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_NUM_EXAMPLES = 3
_NOT_UTF8 = re.compile("[\ud800-\udfff]")


class Reason(StrEnum):
    """Why something isn't among the documents of a corpus."""

    not_utf8 = "not_utf8"
    empty = "empty"
    duplicate = "duplicate"
    # What isn't what it should be: a line, a member of a tar, or the rest of a file.
    corrupt = "corrupt"
    # What can't be had: a link that leads nowhere, a folder that may not be listed.
    unreadable = "unreadable"
    # An object in JSON that is alone in its file, such as a picture's size.
    no_text = "no_text"
    # An ending that isn't known, of something that isn't text.
    unknown_ending = "unknown_ending"
    # Names that begin with a point.
    hidden = "hidden"
    # A folder that is read under another name, or a file that stands for one that is read.
    read_already = "read_already"
    # Pipes, sockets and devices.
    not_a_file = "not_a_file"
    # A folder that this program wrote: shards, or a run.
    output = "output"


# What ends the reading of a corpus, unless it is to be passed over and counted.
FAILURES = (Reason.corrupt, Reason.unreadable)


@dataclass(frozen=True, slots=True)
class Text:
    """A document's text, and where it stands: `a.jsonl, line 3`.

    `unknown_ending` is that of its file's name, where it isn't known and was read as plain text.
    """

    where: str
    text: str
    unknown_ending: str = ""


@dataclass(frozen=True, slots=True)
class Unread:
    """Something that isn't read: where it is, and why not, as the end of a sentence about it.

    `way_out` says what to do about it, beside leaving it out.
    """

    where: str
    reason: Reason
    why: str
    way_out: str = "repair it"


RawDocument = Text | Unread


class LeftOut:
    """What of a corpus was left out, as it is read: how much by reason, and where the first are.

    `num` has the first four reasons always, and others where there was one. `examples` has the
    places of the first few of each, with the fields there are of the first without a text, and
    `why` says of the first what is wrong and what to do.

    `unknown_endings` has the number of documents that were read as plain text, by their ending,
    which isn't known, and `ending_examples` the places of the first few.
    """

    def __init__(self) -> None:
        usual = (Reason.not_utf8, Reason.empty, Reason.duplicate, Reason.corrupt)
        self.num: dict[str, int] = dict.fromkeys(usual, 0)
        self.examples: dict[str, list[str]] = {}
        self.why: dict[str, str] = {}
        self.unknown_endings: dict[str, int] = {}
        self.ending_examples: dict[str, list[str]] = {}

    def add(self, reason: Reason, where: str, why: str = "") -> None:
        """Counts what is at a place and left out."""
        self.why.setdefault(reason, shown(f"{where} {why}"))
        # Their text may be in another field than was thought: the first says which there are.
        is_told = reason is Reason.no_text and reason not in self.examples
        _count(self.num, self.examples, reason, f"{where} {why}" if is_told else where)

    def add_unknown_ending(self, ending: str, where: str) -> None:
        """Counts a document that is read as plain text."""
        _count(self.unknown_endings, self.ending_examples, shown(ending), where)


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
    """What of a source was left out, and what was read as plain text, from its fields' values."""
    report = f"left out: {counts_text(source['num_left_out'], source['left_out_examples'])}"
    if source["unknown_endings"]:
        endings = counts_text(source["unknown_endings"], source["ending_examples"])
        report += f"; read as plain text, their endings not being known: {endings}"
    return report


def as_utf8(text: str) -> str:
    """A text as UTF-8 can hold it: a byte that isn't UTF-8, of a file's name, becomes `\\xe9`."""
    return _NOT_UTF8.sub(lambda found: _escaped(found[0]), text)


def shown(text: str) -> str:
    """A name as UTF-8 can hold it and a line can show it: what isn't printable is escaped."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else _escaped(sign) for sign in text)


def _escaped(sign: str) -> str:
    if "\udc80" <= sign <= "\udcff":  # what Python makes of such a byte
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode("ascii")
