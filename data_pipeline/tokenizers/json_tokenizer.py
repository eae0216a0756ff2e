"""Tokenizers of a Hugging Face `tokenizer.json`, including one trained here.

Owns the only import of the `tokenizers` package, the rules that make such a file a fixed tokenizer
(its fingerprint, no truncation, no randomness), and which of its tokens ends a document. Leaves
the names of tokenizers to `tokenizers`.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.commands.shell import text_setting
from data_pipeline.settings import DataError
from data_pipeline.tokenizers.tokenizer import token_dtype

# Tried in this order if the end-of-document token isn't given.
_USUAL_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
_NUM_BYTES = 256


class JsonTokenizer:
    """The tokenizer that a `tokenizer.json` defines, with one of its tokens to end documents.

    `definition` is its text; `vocab_size` covers all of its ids. If the file normalises text,
    `decode` returns the normalised text.

    Raises DataError for an invalid tokenizer, and for one that encodes randomly.
    """

    needs_processes = True

    def __init__(self, name: str, definition: str, *, end_of_document: int) -> None:
        self.name = name
        self.definition: str | None = definition
        self.end_of_document = end_of_document
        content = _content(definition, where=name)
        # Canonical JSON, so that the fingerprint identifies the tokenizer, not the file.
        spelled = json.dumps(content, separators=(",", ":"), sort_keys=True)
        self.fingerprint = hashlib.sha256(f"{spelled}\n{end_of_document}".encode()).hexdigest()
        self._tokenizer = _tokenizer(content, where=name, end_of_document=end_of_document)
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids) + 1
        self._dtype = token_dtype(self.vocab_size)

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids [num_tokens]; text that spells a special token is encoded as text.

        Raises DataError if the vocabulary holds the end of a document as an ordinary word and the
        text contains that word.
        """
        encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids = np.array(encoded[0].ids, dtype=self._dtype)
        if (ids == self.end_of_document).any():
            spelled = self._tokenizer.id_to_token(self.end_of_document)
            raise DataError(
                f"the text spells {spelled!r}, which ends a document, and {self.name} can't tell "
                "the two apart; give another token with end_of_document=TOKEN, in a shell's quotes"
            )
        return ids

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of token ids, without special tokens and ends of documents."""
        array = np.asarray(ids)
        return self._tokenizer.decode(array[array != self.end_of_document].tolist())

    def spelled(self, id: int) -> str:
        """How the vocabulary spells a token."""
        token = self._tokenizer.id_to_token(id)
        assert token is not None, f"{self.name} has no token {id}"
        return token

    def standalone_definition(self) -> str:
        """The `tokenizer.json` without those of its rules that are not applied here.

        In other programs they would truncate or pad documents, add tokens to them, or find the end
        of one in its text.
        """
        assert self.definition is not None
        before = json.loads(self.definition)
        content = _with_special(_content(self.definition, where=self.name), self.end_of_document)
        added = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if added:
            content["post_processor"] = None
        missing = {key: None for key in ("truncation", "padding", "post_processor")}
        kept = missing | {"added_tokens": []} | before == missing | {"added_tokens": []} | content
        return self.definition if kept else json.dumps(content, ensure_ascii=False)


def read_tokenizer_json(path: Path, *, end_of_document: str | None) -> JsonTokenizer:
    """The tokenizer of a `tokenizer.json`, named after its folder.

    `end_of_document` names the token that ends a document. If None: the `eos_token` of the
    `tokenizer_config.json` in the same folder, or a well-known name that the tokenizer has.

    Raises DataError if the file isn't a tokenizer, and if no token ends a document.
    """
    try:
        definition = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no tokenizer.json: it isn't UTF-8 ({error})") from error
    vocabulary = _tokenizer(_content(definition, where=str(path)), where=str(path)).get_vocab()
    end = _end_of_document(path, vocabulary, asked=end_of_document)
    name = path.absolute().parent.name if path.name == "tokenizer.json" else path.stem
    return JsonTokenizer(name, definition, end_of_document=vocabulary[end])


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> str:
    """The `tokenizer.json` of a byte-level BPE with `vocab_size` ids, trained on the texts.

    Decoding any text's ids returns the text unchanged. `<|endoftext|>` (id 0) ends a document. The
    same texts give the same tokenizer, whatever the number of threads. A pair must occur twice to
    be merged.

    Raises DataError if `vocab_size` is too small for the bytes and the end of a document, and if
    the texts have too few pairs for so many ids.
    """
    smallest = _NUM_BYTES + 1
    if vocab_size < smallest:
        raise DataError(
            f"tokenizer='bpe:{vocab_size}' is too small: {_NUM_BYTES} bytes and the end of a "
            f"document need bpe:{smallest} at least"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[_USUAL_ENDS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise DataError(
            f"tokenizer='bpe:{vocab_size}': the corpus is too small for so many ids; it gives "
            f"{reached}: use bpe:{reached} or fewer, or more text"
        )
    return tokenizer.to_str()


def _content(definition: str, *, where: str) -> dict[str, Any]:
    """The fields of a `tokenizer.json`, without those that would truncate or pad documents."""
    try:
        content = json.loads(definition)
    except ValueError as error:
        raise DataError(f"{where} is no tokenizer.json: it isn't JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(f"{where} is no tokenizer.json: it has no 'model'")
    if content["model"].get("dropout"):
        raise DataError(
            f"{where} encodes by chance: its model has dropout={content['model']['dropout']}, so "
            "that the same text gives other ids each time; set it to null"
        )
    return content | {"truncation": None, "padding": None}


def _tokenizer(
    content: dict[str, Any], *, where: str, end_of_document: int | None = None
) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json.dumps(_with_special(content, end_of_document)))
    except Exception as error:  # the package has no more specific type
        raise DataError(f"{where} is no tokenizer.json that can be read: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def _with_special(content: dict[str, Any], end_of_document: int | None) -> dict[str, Any]:
    """The fields with the end of a document as a special token, whatever the file says.

    It must never come from text, and special tokens are not matched in text.
    """
    added = [
        token | {"special": True} if token["id"] == end_of_document else token
        for token in content.get("added_tokens") or []
    ]
    return content | {"added_tokens": added}


def _end_of_document(path: Path, vocabulary: dict[str, int], *, asked: str | None) -> str:
    form = _form(vocabulary, asked=asked)
    way_out = f"say which token of {path} ends a document with {form}"
    beside = path.with_name("tokenizer_config.json")
    token, said_by = asked, f"end_of_document={asked!r}"
    if token is None:
        token = _eos_token(beside)
        said_by = f"{beside} has eos_token={token!r}, which"
    if token is None:
        token = next((usual for usual in _USUAL_ENDS if usual in vocabulary), None)
    if token is None:
        raise DataError(
            f"{path} has none of {', '.join(_USUAL_ENDS)}, and no tokenizer_config.json beside it "
            f"names its eos_token; {way_out}"
        )
    if token not in vocabulary:
        raise DataError(f"{said_by} is not in the vocabulary; {way_out}")
    return token


def _form(vocabulary: Iterable[str], *, asked: str | None) -> str:
    """What to type for the end of a document: an example with a known token, in shell quotes."""
    ends = sorted(word for word in vocabulary if re.search(r"^[<\[].*(eo[a-z]|end|/s)", word, re.I))
    close = difflib.get_close_matches(asked or _USUAL_ENDS[0], ends, n=1, cutoff=0.0)
    if not close:
        return "end_of_document=TOKEN, which stands in a shell's quotes where it has signs in it"
    return f"{text_setting('end_of_document', close[0])}, or another"


def _eos_token(path: Path) -> str | None:
    """The `eos_token` of a `tokenizer_config.json`, None if there is none."""
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is no tokenizer_config.json: {error}") from error
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
