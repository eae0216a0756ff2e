"""Mixtral's tokenizers: the same ids as mistral-common's own encoding, computed word by word.

Owns the only imports of sentencepiece and of mistral-common, which has the vocabularies. Leaves
the names of tokenizers to `tokenizers`.

Sentencepiece merges two neighbours only if the vocabulary has the merged piece. At a position that
no piece of the vocabulary can span, the text can therefore be cut. Its parts are encoded one by one
and cached, since words repeat: two to three times as fast. The vocabulary itself is searched for
pieces that span cuts, and a text that contains one is encoded as a whole.
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
_SPACE = "\u2581"  # how a piece spells a space; in a text both are encoded the same
# ASCII punctuation and control characters, and what adjoins them in pieces (`.”`, `²,`).
_MARKS = r"\x00-\t\x0b-\x1f!-/:-@\[-`{-\x7f²–—’“”†…«»"
# A word is spaces and what follows them: letters, marks or a digit. Whether there is a cut between
# two characters depends only on these two, so that a vocabulary can be checked piece by piece.
_WORDS = re.compile(
    rf"[ {_SPACE}]*(?:[^{_MARKS}0-9 {_SPACE}\n]+|[{_MARKS}]+|[0-9])|[ {_SPACE}]+|\n+"
)
_CHARACTERS_AT_ONCE = 2**16  # a list of words takes about fifty times the memory of its text
_WORDS_KEPT = 2**18  # about 40 MB
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
        """The text of token ids, without control tokens."""
        text: str = self._model.decode(np.asarray(ids).tolist())
        return text

    def pieces(self) -> list[str]:
        """Every token's spelling, by its id; the unknown token comes first."""
        return [self._model.id_to_piece(id) for id in range(self.vocab_size)]

    def is_special(self, id: int) -> bool:
        """Whether a token is a control token or the unknown one, which never come from text."""
        return bool(self._model.is_control(id) or self._model.is_unknown(id))

    def scores(self) -> dict[str, float]:
        """The score of each piece that merging can produce; the best is merged first."""
        scored = self._model.piece_to_id(_pieces(self._model))
        return {self._model.id_to_piece(id): self._model.get_score(id) for id in scored}

    def whole_pieces(self) -> list[str]:
        """The pieces that are extracted from a text before others are merged.

        In Mixtral's vocabularies they are those that span words; no merged piece does.
        """
        return _spanning(_pieces(self._model))

    @property
    def words(self) -> str:
        """The pattern of words; nothing else is merged across their boundaries."""
        return _WORDS.pattern


@TOKENIZERS.register("mixtral-v1")
def mixtral_v1() -> MixtralTokenizer:
    """Returns the tokenizer of 8x7B."""
    return MixtralTokenizer("mixtral-v1")


@TOKENIZERS.register("mixtral-v3")
def mixtral_v3() -> MixtralTokenizer:
    """Returns the tokenizer of 8x22B."""
    return MixtralTokenizer("mixtral-v3")


class _IdsOfWord(dict[str, bytes]):
    """The ids of a word as little-endian 16-bit numbers; results are cached."""

    def __init__(self, model: SentencePieceProcessor) -> None:
        self._encode = model.encode
        # Sentencepiece puts a space before its input. After a newline, which no piece contains, a
        # word is encoded as inside a text; the space and the newline are removed.
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
    """The words of a text, after the space that sentencepiece puts before it, in batches."""
    if not text:
        return
    text = " " + text
    start, num_characters = 0, _CHARACTERS_AT_ONCE
    while True:
        words = _WORDS.findall(text, start, start + num_characters)
        if start + num_characters >= len(text):
            yield words
            return
        last = words.pop()  # it may continue
        if words:
            yield words
            start += num_characters - len(last)
        else:
            num_characters *= 2


def spanning_pieces(pieces: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern that finds pieces in a text that span a cut between words; None if there are none.

    In Mixtral's vocabularies these are some that v3 reserved, such as `[REFERENCE_DOC_1]`.
    """
    spanning = _spanning(pieces)
    spellings = (re.escape(piece).replace(_SPACE, f"[ {_SPACE}]") for piece in spanning)
    return re.compile("|".join(spellings)) if spanning else None


def _spanning(pieces: Sequence[str]) -> list[str]:
    return [piece for piece in pieces if _WORDS.findall(piece) != [piece]]


def _pieces(model: SentencePieceProcessor) -> list[str]:
    """The pieces that merging can produce: neither control tokens nor single bytes."""
    return [
        model.id_to_piece(i)
        for i in range(model.vocab_size())
        if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))
    ]
