"""Tokenizers: text to token ids and back, each with the fingerprint of what defines it.

Owns the names of the tokenizers and the only import of mistral-common. Leaves to `shards` where
documents end up: a tokenizer only says which id ends one.

No tokenizer here puts a beginning-of-sequence token before a document. The end of the document
before it says the same, and a model that was trained so can be given either at generation.
"""

import difflib
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.settings import DataError

TOKENIZER_NAMES = ("bytes", "mixtral-v1", "mixtral-v3")


class Tokenizer(Protocol):
    """Text to token ids and back.

    `fingerprint` is a SHA-256 in hex: two tokenizers with the same one give the same ids.
    `needs_processes` says whether it is slow enough that processes are worth their start.
    """

    name: str
    vocab_size: int
    end_of_document: int
    fingerprint: str
    needs_processes: bool

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids [num_tokens] in `token_dtype`, without the end of the document."""
        ...

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of token ids, ends of documents left out."""
        ...


def tokenizer_named(name: str) -> Tokenizer:
    """The tokenizer of that name; raises DataError for a name there is none of."""
    if name == "bytes":
        return ByteTokenizer()
    if name in TOKENIZER_NAMES:
        return MixtralTokenizer(name)
    nearest = difflib.get_close_matches(name, TOKENIZER_NAMES, n=1, cutoff=0.0)[0]
    raise DataError(
        f"tokenizer={name!r} is not known; did you mean {nearest!r}? "
        f"There are {', '.join(TOKENIZER_NAMES)}"
    )


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest of little-endian uint16 and uint32 that holds every id of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ByteTokenizer:
    """One token a byte of UTF-8, and id 256 for the end of a document."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256
    fingerprint = hashlib.sha256(b"utf-8 bytes, end of document 256").hexdigest()
    needs_processes = False

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids [num_bytes], without the end of the document."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(token_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of token ids; what isn't UTF-8, as where a slice begins, becomes U+FFFD."""
        array = np.asarray(ids)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class MixtralTokenizer:
    """Mistral's sentencepiece tokenizer: `mixtral-v1` for 8x7B, `mixtral-v3` for 8x22B.

    Its EOS is the end of a document, as in Mistral's own training; text that spells a control
    token (`</s>`) is encoded as text.
    """

    end_of_document: int
    needs_processes = True

    def __init__(self, name: str) -> None:
        # Imported here: it takes half a second, which users of the byte tokenizer need not wait.
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        make = {"mixtral-v1": MistralTokenizer.v1, "mixtral-v3": MistralTokenizer.v3}[name]
        self._tokenizer = make().instruct_tokenizer.tokenizer
        self.name = name
        self.vocab_size = self._tokenizer.n_words
        self.end_of_document = self._tokenizer.eos_id
        self.fingerprint = hashlib.sha256(self._tokenizer.file_path.read_bytes()).hexdigest()

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids [num_tokens], without BOS or EOS."""
        ids = self._tokenizer.encode(text, bos=False, eos=False)
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of token ids, control tokens left out."""
        return self._tokenizer.decode(np.asarray(ids).tolist())
