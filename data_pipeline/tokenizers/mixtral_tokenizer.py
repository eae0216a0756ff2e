"""Mixtral's tokenizers: the ids of mistral-common's own encoding, found word by word.

Owns the only imports of sentencepiece and of mistral-common, which brings the vocabularies. Leaves
the names of tokenizers to `tokenizers`.

Sentencepiece joins two neighbours only where the vocabulary has the joined piece. A place in the
text that no piece of the vocabulary can span is therefore a place where the text can be cut, and
its parts encoded one by one, and kept, since words come again: two to three times as fast. Whether
pieces can span the cuts is asked of the vocabulary itself, and a text that holds one that does is
encoded as a whole.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

from data_pipeline.tokenizers.tokenizer import TOKENIZERS

_FILES = {
    "mixtral-v1": "tokenizer.model.v1",
    "mixtral-v3": "mistral_instruct_tokenizer_240323.model.v3",
}
_SPACE = "\u2581"  # how a piece spells a space; in a text the two are encoded alike
# ASCII punctuation and control characters, and what stands beside them in pieces (`.”`, `²,`).
_MARKS = r"\x00-\t\x0b-\x1f!-/:-@\[-`{-\x7f²–—’“”†…«»"
# A word is spaces and what they lead: letters, marks or a digit. Whether there is a cut between two
# characters depends on these two alone, so that a vocabulary can be checked piece by piece.
_WORDS = re.compile(
    rf"[ {_SPACE}]*(?:[^{_MARKS}0-9 {_SPACE}\n]+|[{_MARKS}]+|[0-9])|[ {_SPACE}]+|\n+"
)
_CHARACTERS_AT_ONCE = 2**16  # a list of words takes some fifty times the memory of its text
_WORDS_KEPT = 2**18  # some 40 MB
_LONGEST_KEPT = 32


class MixtralTokenizer:
    """Mistral's sentencepiece tokenizer: `mixtral-v1` for 8x7B, `mixtral-v3` for 8x22B.

    Its EOS is the end of a document, as in Mistral's own training; text that spells a control
    token (`</s>`) is encoded as text.
    """

    needs_processes = True
    definition: str | None = None

    def __init__(self, name: str) -> None:
        model = (files("mistral_common") / "data" / _FILES[name]).read_bytes()
        self._model = SentencePieceProcessor(model_proto=model)
        self.name = name
        self.vocab_size: int = self._model.vocab_size()
        self.end_of_document: int = self._model.eos_id()
        self.beginning: int = self._model.bos_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._ids_of_word = _IdsOfWord(self._model)
        self._spanning = spanning_pieces(_pieces(self._model))

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids [num_tokens], without BOS or EOS."""
        if self._spanning is not None and self._spanning.search(text):
            return np.array(self._model.encode(text), dtype="<u2")
        ids_of = self._ids_of_word.__getitem__
        return np.frombuffer(b"".join([b"".join(map(ids_of, w)) for w in words_of(text)]), "<u2")

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of token ids, control tokens left out."""
        text: str = self._model.decode(np.asarray(ids).tolist())
        return text

    def pieces(self) -> list[str]:
        """Every token's spelling, by its id; the unknown token's is the first."""
        return [self._model.id_to_piece(id) for id in range(self.vocab_size)]

    def is_special(self, id: int) -> bool:
        """Whether a token is a control token or the unknown one, which no text has."""
        return bool(self._model.is_control(id) or self._model.is_unknown(id))

    def scores(self) -> dict[str, float]:
        """The score of each piece that text can be joined to; the best is joined first."""
        scored = self._model.piece_to_id(_pieces(self._model))
        return {self._model.id_to_piece(id): self._model.get_score(id) for id in scored}

    def whole_pieces(self) -> list[str]:
        """The pieces that are taken out of a text before others are joined.

        They are those that span words, in Mixtral's vocabularies; no joined piece does.
        """
        return _spanning(_pieces(self._model))

    @property
    def words(self) -> str:
        """The pattern of the words between which nothing else is joined."""
        return _WORDS.pattern


@TOKENIZERS.register("mixtral-v1")
def mixtral_v1() -> MixtralTokenizer:
    """Returns that of 8x7B."""
    return MixtralTokenizer("mixtral-v1")


@TOKENIZERS.register("mixtral-v3")
def mixtral_v3() -> MixtralTokenizer:
    """Returns that of 8x22B."""
    return MixtralTokenizer("mixtral-v3")


class _IdsOfWord(dict[str, bytes]):
    """The ids of a word as little-endian 16-bit numbers; what was asked before is kept."""

    def __init__(self, model: SentencePieceProcessor) -> None:
        self._encode = model.encode
        # Sentencepiece puts a space before what it encodes. Behind a newline, which no piece
        # holds, a word stands as it would in a text; the space and the newline are taken off.
        self._before = self._encode("\n")
        assert len(self._before) == 2
        assert not any("\n" in piece for piece in _pieces(model))

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._encode("\n" + word)[2:], dtype="<u2").tobytes()
        if len(word) <= _LONGEST_KEPT:
            if len(self) >= _WORDS_KEPT:
                self.clear()
            self[word] = ids
        return ids


def words_of(text: str) -> Iterator[list[str]]:
    """The words of a text behind the space that sentencepiece puts before it, some at a time."""
    if not text:
        return
    text = " " + text
    start, num_characters = 0, _CHARACTERS_AT_ONCE
    while True:
        words = _WORDS.findall(text, start, start + num_characters)
        if start + num_characters >= len(text):
            yield words
            return
        last = words.pop()  # it may go on
        if words:
            yield words
            start += num_characters - len(last)
        else:
            num_characters *= 2


def spanning_pieces(pieces: Sequence[str]) -> re.Pattern[str] | None:
    """What finds, in a text, the pieces that span a cut between words; None where there are none.

    Of Mixtral's these are some that v3 reserved, such as `[REFERENCE_DOC_1]`.
    """
    spanning = _spanning(pieces)
    spellings = (re.escape(piece).replace(_SPACE, f"[ {_SPACE}]") for piece in spanning)
    return re.compile("|".join(spellings)) if spanning else None


def _spanning(pieces: Sequence[str]) -> list[str]:
    return [piece for piece in pieces if _WORDS.findall(piece) != [piece]]


def _pieces(model: SentencePieceProcessor) -> list[str]:
    """The pieces that text can be joined to: neither control tokens nor single bytes."""
    return [
        model.id_to_piece(i)
        for i in range(model.vocab_size())
        if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))
    ]
