"""The interface of a tokenizer, and the simplest one: one token per byte.

No tokenizer here puts a beginning-of-sequence token before a document. The end of the previous
document has the same meaning, and a model trained this way accepts either at generation. The
writer of shards decides where documents end: a tokenizer only says which id ends one.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from data_pipeline.extensions import Registry
from data_pipeline.settings import Count, Natural, Sha256


class Tokenizer(Protocol):
    """Text to token ids and back.

    `fingerprint` is a SHA-256 in hex: two tokenizers with the same one give the same ids.
    `definition` is the text of the `tokenizer.json` it is made from, None if `name` is enough.
    `needs_processes` says whether it is slow enough to make several processes worthwhile.
    """

    name: str
    vocab_size: int
    end_of_document: int
    fingerprint: str
    definition: str | None
    needs_processes: bool

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids [num_tokens] in `token_dtype`, without the end of the document."""
        ...

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of token ids, without ends of documents."""
        ...


TOKENIZERS = Registry[Callable[[], Tokenizer]](
    "tokenizer",
    setting="tokenizer",
    built_in={
        "bytes": "data_pipeline.tokenizers.tokenizer",
        "mixtral-v1": "data_pipeline.tokenizers.mixtral_tokenizer",
        "mixtral-v3": "data_pipeline.tokenizers.mixtral_tokenizer",
    },
)
"""Those that are fully defined by a name; each is created without arguments."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TokenizerEntry:
    """The tokenizer that made the tokens; `fingerprint` is a SHA-256 in hex.

    `file` is the `tokenizer.json` in the folder, None if the name is enough.
    """

    name: str
    vocab_size: Count
    end_of_document: Natural
    fingerprint: Sha256
    file: str | None = None


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smaller of little-endian uint16 and uint32 that holds every id of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@TOKENIZERS.register("bytes")
class ByteTokenizer:
    """One token per byte of UTF-8, and id 256 for the end of a document."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256
    fingerprint = hashlib.sha256(b"utf-8 bytes, end of document 256").hexdigest()
    definition: str | None = None
    needs_processes = False

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids [num_bytes], without the end of the document."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(token_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of token ids; invalid UTF-8, as at the cut of a slice, becomes U+FFFD."""
        array = np.asarray(ids)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
