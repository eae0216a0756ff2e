"""Documents in JSON: one per line, one per element of an array, or concatenated values.

Owns distinguishing these forms, reading them piece by piece, whatever their size, and finding a
document's text in an object. Leaves which files are JSON to `text_files`.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import BufferedReader
from itertools import chain, islice
from typing import Any, BinaryIO, TypeGuard

from data_pipeline.corpora.compression import DamagedError
from data_pipeline.corpora.raw_documents import RawDocument, Reason, Text, Unread

# What to do if the named field has no text.
FIELD_WAY_OUT = (
    "name the field by text_field=… (of one source by sources.NAME.text_field=…, in training by "
    "data.text_field=…)"
)

_BOM = codecs.BOM_UTF8
_CHARACTERS_AT_ONCE = 2**20
# Limit of one value: a missing quote must not discard a whole file.
_LONGEST_VALUE = 2**30
_NUM_FIELDS_NAMED = 12

_ARRAY_OF_OBJECTS = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")
_OBJECT = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"')
_ARRAY_OF_NAMED_VALUES = re.compile(rb'(\xef\xbb\xbf)?\s*\[\s*\{\s*"[^"\\]*"\s*:')
_SPACE = re.compile(r"[ \t\n\r]*+")
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_BRACKETS = re.compile(rf'{_STRING}|[\[\]{{}}"]', re.DOTALL)
_ENDS = re.compile(rf'{_STRING}|[,\]"]', re.DOTALL)

_TYPES = {type(None): "null", bool: "true or false", list: "a list", int: "a number"}


def json_lines(file: BufferedReader, where: str, field: str) -> Iterator[RawDocument]:
    """The documents of JSON lines: the text in `field` of each line's object.

    An array of objects, despite the file's name, is read as one too.
    """
    return map(_demanded, (_elements if is_array(file) else _lines)(file, where, field))


def json_lines_between(
    file: BufferedReader, where: str, field: str, *, begin: int, end: int, num_before: int
) -> Iterator[RawDocument]:
    """The documents of the lines that begin at `begin` ≤ byte < `end`, after `num_before` lines."""
    if begin:
        file.seek(begin - 1)
        file.readline()  # the rest of a line that begins before
    return map(_demanded, _lines(_LinesBefore(file, end), where, field, first=num_before + 1))


def is_array(file: BufferedReader) -> bool:
    """Whether a file of JSON lines, read from its beginning, is an array of objects instead."""
    return _ARRAY_OF_OBJECTS.match(file.peek(1)) is not None


def json_values(file: BufferedReader, where: str, field: str) -> Iterator[RawDocument]:
    """The documents of a `.json` file: lines, an array or values, as its content shows.

    A single object without text isn't an error: it usually describes other files.
    """
    if file.peek(1).removeprefix(_BOM).lstrip().startswith(b"["):
        yield from map(_demanded, _elements(file, where, field))
        return
    beginning = _first_lines(file, 1)  # which may be longer than what can be peeked
    line = beginning.removeprefix(_BOM).strip()
    is_spread = line.startswith(b"{") and beginning.endswith(b"\n") and not line.endswith(b"}")
    documents = (_spread_values if is_spread else _lines)(_rejoined(beginning, file), where, field)
    first = next(documents, None)
    if first is None:
        yield Unread(where, Reason.empty, "is empty")
    elif not _has_no_text(first):
        yield from map(_demanded, chain([first], documents))
    elif (second := next(documents, None)) is None:
        yield first
    else:
        yield from map(_demanded, chain([first, second], documents))


def json_by_content(
    file: BufferedReader, where: str, field: str
) -> tuple[BufferedReader, Iterator[RawDocument] | None]:
    """The rewound file, and its documents if its content is JSON, whatever its name.

    It is JSON if its first two lines are objects, if its only line is one with a text in `field`,
    or if it begins like an array of objects.
    """
    beginning = file.peek(1)
    if _ARRAY_OF_NAMED_VALUES.match(beginning):
        return file, json_lines(file, where, field)
    if not _OBJECT.match(beginning):
        return file, None
    lines = _first_lines(file, 2)
    again = _rejoined(lines, file)
    try:
        records = [json.loads(line) for line in lines.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return again, None
    is_json = all(isinstance(record, dict) for record in records) and (
        len(records) > 1 or text_in(records[0], field) is not None
    )
    return again, json_lines(again, where, field) if is_json else None


def text_in(record: Any, field: str) -> str | None:
    """The string in a field of an object, `a.b` for a nested one; None if there is none."""
    if isinstance(record, dict) and isinstance(found := record.get(field), str):
        return found
    for part in field.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(part)
    return record if isinstance(record, str) else None


def missing_text(what: str, fields: Iterator[str]) -> str:
    """The end of a sentence about something without a text, which has `fields`."""
    named = list(islice(fields, _NUM_FIELDS_NAMED + 1))
    if len(named) > _NUM_FIELDS_NAMED:
        named[-1] = "…"
    return f"has no {what}, but {', '.join(named) or 'nothing'}"


def _first_lines(file: BinaryIO, number: int) -> bytes:
    """The first lines that aren't blank, including any blank lines before them."""
    lines = b""
    try:
        while number and (line := file.readline(_LONGEST_VALUE)):
            lines += line
            number -= bool(line.strip())
    except DamagedError:  # the reader that continues will meet it again
        if not lines:
            raise
    return lines


class _Rejoined(io.RawIOBase):
    """A file from its beginning, of which a part was already read."""

    def __init__(self, beginning: bytes, rest: BufferedReader) -> None:
        self._beginning, self._rest = io.BytesIO(beginning), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._beginning.readinto(buffer) or self._rest.readinto(buffer)


def _rejoined(beginning: bytes, rest: BufferedReader) -> BufferedReader:
    return BufferedReader(_Rejoined(beginning, rest))


class _LinesBefore:
    """The lines of a file that begin before a byte."""

    def __init__(self, file: BufferedReader, end: int) -> None:
        self._file, self._left = file, end - file.tell()

    def readline(self, size: int) -> bytes:
        line = self._file.readline(size) if self._left > 0 else b""
        self._left -= len(line)
        return line


def _bounded(lines: "BinaryIO | _LinesBefore", where: str) -> Iterator[bytes]:
    """The lines of a file; raises DamagedError for one that may not fit into memory."""
    for line in iter(partial(lines.readline, _LONGEST_VALUE), b""):
        if len(line) == _LONGEST_VALUE and not line.endswith(b"\n"):
            raise DamagedError(f"{where} has a line of more than {_LONGEST_VALUE} bytes")
        yield line


def _lines(
    file: "BinaryIO | _LinesBefore", where: str, field: str, *, first: int = 1
) -> Iterator[RawDocument]:
    for number, line in enumerate(_bounded(file, where), start=first):
        if not line.isspace():
            place = f"{where}, line {number}"
            try:
                yield _document(json.loads(line), place, field)
            except UnicodeDecodeError as error:
                yield Unread(place, Reason.not_utf8, f"is not UTF-8: {error}")
            except (ValueError, RecursionError) as error:
                yield _not_json(place, error)


def _elements(file: BinaryIO, where: str, field: str) -> Iterator[RawDocument]:
    """The documents of an array, one per element."""
    values, number = _Values(file), 0
    values.take()  # the opening bracket
    sign = "," if values.next_sign() != "]" else "]"
    while sign == ",":
        number += 1
        yield values.document(f"{where}, element {number}", field)
        sign = values.next_sign()
        if sign not in (",", "]"):
            what = "is followed by no comma" if sign else "is the last, and the array doesn't end"
            raise DamagedError(f"element {number} {what}")
        values.take()
    if number == 0:
        yield Unread(where, Reason.empty, "is empty")
        values.take()
    if values.next_sign():
        raise DamagedError("something follows the end of the array")


def _spread_values(file: BinaryIO, where: str, field: str) -> Iterator[RawDocument]:
    """The documents of concatenated values, each over any number of lines."""
    values, number = _Values(file), 0
    while values.next_sign():
        number += 1
        document = values.document(f"{where}, value {number}", field)
        yield document
        if isinstance(document, Unread) and document.reason is Reason.corrupt:
            return  # the start of the next value is unknown


class _Values:
    """JSON values in a file, of which at most one is in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        # A byte that isn't UTF-8 affects only the text that contains it.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def next_sign(self) -> str:
        """The next character that isn't white space; an empty string at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None, "nothing is space enough"
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def take(self) -> None:
        """Skips the next character."""
        if self.next_sign():
            self._at += 1

    def document(self, where: str, field: str) -> RawDocument:
        """The document in the next value; skips the value even if it is invalid."""
        self.next_sign()
        while True:
            try:
                record, end = self._decode(self._text, self._at)
                # A number may continue in the part that isn't read yet.
                if end < len(self._text) or self._ended:
                    self._at = end
                    return _document(record, where, field)
            except (ValueError, RecursionError) as error:
                found = _end_of_value(self._text, self._at)
                if found is not None or self._ended:
                    self._at = len(self._text) if found is None else found
                    return _not_json(where, error)
            if len(self._text) - self._at > _LONGEST_VALUE:
                raise DamagedError(f"{where} has no end in {_LONGEST_VALUE} characters")
            self._read_on()

    def _read_on(self) -> bool:
        """Doubles the unparsed text, so that a long value isn't parsed too often."""
        if self._ended:
            return False
        waiting = self._text[self._at :]
        content = self._file.read(max(_CHARACTERS_AT_ONCE, len(waiting)))
        self._ended = not content
        self._text = waiting + self._decoder.decode(content, final=self._ended)
        self._at = 0
        return True


def _end_of_value(text: str, start: int) -> int | None:
    """Where a possibly invalid value ends by its brackets and quotes; None: not within `text`."""
    depth = 0
    for found in (_BRACKETS if text.startswith(("[", "{"), start) else _ENDS).finditer(text, start):
        sign = found[0]
        if sign == '"':  # of a string that doesn't end in `text`
            return None
        if sign == "," or (sign == "]" and depth == 0):
            return found.start()
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(sign, 0)
        if depth == 0 and sign in "]}":
            return found.end()
    return None


def _document(record: Any, where: str, field: str) -> RawDocument:
    text = text_in(record, field)
    if text is not None:
        return Text(where, text)
    if not isinstance(record, dict):
        why = f"has no {field!r} field that holds a string: it is no object"
        return Unread(where, Reason.corrupt, why)
    why = missing_text(f"{field!r} field that holds a string", _fields(record))
    return Unread(where, Reason.no_text, why, FIELD_WAY_OUT)


def _fields(record: dict[str, Any], inside: str = "") -> Iterator[str]:
    """The names of an object's fields, with the type of those that hold no string."""
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{inside}{name}.")
        else:
            kind = "" if isinstance(value, str) else f" ({_TYPES.get(type(value), 'a number')})"
            yield f"{inside}{name}{kind}"


def _demanded(document: RawDocument) -> RawDocument:
    """The same, for objects that must each have a text."""
    return replace(document, reason=Reason.corrupt) if _has_no_text(document) else document


def _has_no_text(document: RawDocument) -> TypeGuard[Unread]:
    return isinstance(document, Unread) and document.reason is Reason.no_text


def _not_json(where: str, error: Exception) -> Unread:
    return Unread(where, Reason.corrupt, f"is not JSON: {error}")
