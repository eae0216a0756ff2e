"""Text that is tokenised while training: its sequences, wherever reading begins.

Owns the way from documents of text, in the order of the seed, to sequences of tokens. Leaves the
order to `order`, tokenising to `encoding`, and arrays of batches to `batches`.

How many tokens a document has is only known when it is tokenised. So the place of a sequence
follows from all documents before it, or from a place that was known: a checkpoint holds one for
each source, as three integers. Every rank tokenises all documents, and so knows the same places.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reading.order import Order
from data_pipeline.reading.packing import Pieces
from data_pipeline.shards.reader import Documents

_Integers = NDArray[np.int64]
_Texts = Iterable[tuple[None, bytes | None]]
Encoded = Callable[[_Texts], Iterator[tuple[None, NDArray[np.integer] | None]]]
_Tokens = NDArray[np.integer]

_DOCUMENTS_AT_ONCE = 1024  # whose places in the order are asked for together
_PLACES_KEPT = 4096


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where a sequence begins: at token `offset` of the `document`-th document in the order."""

    sequence: int = 0
    document: int = 0
    offset: int = 0


class EncodedDocuments:
    """Tokenised documents in memory, each with its end; read as `reader.Documents` are."""

    def __init__(self, tokens: Sequence[NDArray[np.integer]]) -> None:
        self._tokens = tokens
        lengths = [len(found) for found in tokens]
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        self.dtype: np.dtype[np.unsignedinteger] = np.dtype(np.uint32)  # holds any tokenizer's ids

    def whole(self, documents: _Integers) -> NDArray[np.bool_]:
        """All of the documents [n]: they were checked before they were tokenised."""
        return np.ones(len(documents), dtype=np.bool_)

    def read(
        self,
        documents: _Integers,
        offsets: _Integers,
        lengths: _Integers,
        *,
        out: NDArray[np.unsignedinteger],
        places: _Integers,
    ) -> _Integers:
        """Copies pieces [n] to `places` of the one-dimensional `out`.

        Returns the token before each piece [n], of no meaning where an offset is 0.
        """
        before = np.zeros(len(documents), np.int64)
        pieces = zip(documents.tolist(), offsets.tolist(), lengths.tolist(), strict=True)
        for number, (document, offset, length) in enumerate(pieces):
            tokens = self._tokens[document]
            out[places[number] : places[number] + length] = tokens[offset : offset + length]
            before[number] = tokens[offset - 1]
        return before


class TextSequences:
    """The sequences of a source of text, of `seq_len` tokens each, without end.

    Sequences are cut from one stream of all documents, epoch after epoch. Reading on is cheapest;
    going back or far ahead tokenises what is between the place and the nearest known one before
    it. Safe to use from several threads, which wait for each other.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        order: Order,
        encoded: Encoded,
        seq_len: int,
        start: RankPlace,
    ) -> None:
        self._documents = documents
        self._order = order
        self._encoded = encoded
        self._seq_len = seq_len
        self._places = {start.sequence: start}
        self._here = start
        self._tokens: Iterator[_Tokens] | None = None  # as yet unread
        self._current: _Tokens = np.zeros(0, np.uint16)
        self._lock = threading.Lock()

    def read(self, numbers: _Integers, *, first: int, last: int) -> tuple[EncodedDocuments, Pieces]:
        """What stands in the sequences `numbers` [rows], which are among first … last - 1.

        Raises ValueError for a sequence before the start, and DataError for a document that isn't
        what was written.
        """
        with self._lock:
            self._go_to(first)
            wanted = {number: row for row, number in enumerate(numbers.tolist())}
            found, pieces = list[_Tokens](), list[tuple[int, ...]]()
            newest = -1
            for sequence, slot, document, offset, length in self._walk(last):
                if sequence not in wanted:
                    continue
                if document != newest:
                    newest = document
                    found.append(self._current)
                pieces.append((wanted[sequence], slot, len(found) - 1, offset, length))
            self._remember()
        table = np.array(pieces, np.int64).reshape(-1, 5).T
        rows, slots, which, offsets, lengths = table
        return EncodedDocuments(found), Pieces(
            rows=rows, slots=slots, documents=which, offsets=offsets, lengths=lengths
        )

    def place(self, number: int) -> RankPlace:
        """Where sequence `number` begins."""
        with self._lock:
            if number not in self._places:
                self._go_to(number)
            return self._places[number]

    def _go_to(self, number: int) -> None:
        if number != self._here.sequence or self._tokens is None:
            known = [place for place in self._places if place <= number]
            if not known:
                raise ValueError(
                    f"sequence {number} is before {min(self._places)}, from where on this text "
                    "is known"
                )
            nearest = self._places[max(known)]
            if self._tokens is None or not nearest.sequence <= self._here.sequence <= number:
                self._here, tokens = nearest, self._encoded_from(nearest.document)
                self._current = next(tokens)
                self._tokens = tokens
            for _ in self._walk(number):
                pass
        self._remember()

    def _remember(self) -> None:
        self._places[self._here.sequence] = self._here
        if len(self._places) > _PLACES_KEPT:
            del self._places[next(islice(self._places, 1, None))]  # the start is always kept

    def _walk(self, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Goes on to sequence `end`; yields (sequence, slot, document, offset, length) of pieces.

        `_current` has the document of the piece that was yielded last.
        """
        assert self._tokens is not None
        tokens, here, slot = self._tokens, self._here, 0
        self._tokens = None  # until the walk has come to its end: what fails on it begins anew
        while here.sequence < end:
            num_tokens = len(self._current)
            length = min(num_tokens - here.offset, self._seq_len - slot)
            yield here.sequence, slot, here.document, here.offset, length
            slot += length
            document, offset = here.document, here.offset + length
            if offset == num_tokens:
                document, offset = document + 1, 0
                self._current = next(tokens)
            full, slot = divmod(slot, self._seq_len)
            here = RankPlace(sequence=here.sequence + full, document=document, offset=offset)
        self._here, self._tokens = here, tokens

    def _encoded_from(self, document: int) -> Iterator[_Tokens]:
        """The tokens of the documents in the order, from number `document` on."""
        encoded = self._encoded(self._texts_from(document))
        return (tokens for _, tokens in encoded if tokens is not None)

    def _texts_from(self, document: int) -> Iterator[tuple[None, bytes | None]]:
        for first in count(document, _DOCUMENTS_AT_ONCE):
            _, positions = self._order.at(np.arange(first, first + _DOCUMENTS_AT_ONCE))
            for position in positions.tolist():
                yield None, self._documents.tokens(position).tobytes()


def encoded_documents(
    documents: Documents, *, order: Iterable[int], encoded: Encoded, num_tokens: int | None
) -> EncodedDocuments:
    """The documents in that order, tokenised: all, or the first ones that have `num_tokens`."""
    found, so_far = list[_Tokens](), 0
    texts = ((None, documents.tokens(number).tobytes()) for number in order)
    for _, tokens in encoded(texts):
        assert tokens is not None
        found.append(tokens)
        so_far += len(tokens)
        if num_tokens is not None and so_far >= num_tokens:
            break
    return EncodedDocuments(found)
