"""Any tokenizer here as a Hugging Face `tokenizer.json` that gives the same ids.

Owns converting the built-in tokenizers, and which of a file's own rules would give different ids.
Leaves reading such files to `json_tokenizer`.

Encoding is the same if special tokens in a text are treated as text (transformers:
`split_special_tokens`). Decoding is the same except for ids that no text has: of a run of bytes
that aren't UTF-8, Mixtral's file turns each into U+FFFD, while sentencepiece decodes what it can.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from data_pipeline.tokenizers.tokenizer import ByteTokenizer, Tokenizer

_SPACE = "\u2581"  # how a piece of sentencepiece spells a space


@dataclass(frozen=True, kw_only=True)
class TokenizerJson:
    """The text of a `tokenizer.json`, and which of its tokens are special."""

    definition: str
    end_of_document: str
    beginning: str | None
    """The token that begins a text in other programs; here the end of a document does."""
    unknown: str | None


def tokenizer_json(tokenizer: Tokenizer) -> TokenizerJson:
    """A tokenizer as a `tokenizer.json`; a file's own is unchanged, unless it gives other ids."""
    # Imported where they are used, so that unused ones cost no time.
    if tokenizer.definition is not None:
        from data_pipeline.tokenizers.json_tokenizer import JsonTokenizer

        assert isinstance(tokenizer, JsonTokenizer)
        return TokenizerJson(
            definition=tokenizer.standalone_definition(),
            end_of_document=tokenizer.spelled(tokenizer.end_of_document),
            beginning=None,
            unknown=None,
        )
    if isinstance(tokenizer, ByteTokenizer):
        return _of_bytes()
    from data_pipeline.tokenizers.mixtral_tokenizer import MixtralTokenizer

    assert isinstance(tokenizer, MixtralTokenizer)
    return _of_sentencepiece(tokenizer)


def _of_bytes() -> TokenizerJson:
    end = "<|endoftext|>"
    vocabulary = {spelling: byte for byte, spelling in enumerate(_spelled_bytes())}
    content = _content(
        vocabulary | {end: ByteTokenizer.end_of_document},
        special={end: ByteTokenizer.end_of_document},
        merges=[],
    )
    content["pre_tokenizer"] = _byte_level()
    content["decoder"] = _byte_level()
    return TokenizerJson(
        definition=_text(content), end_of_document=end, beginning=None, unknown=None
    )


def _of_sentencepiece(tokenizer: Any) -> TokenizerJson:
    """The merges of sentencepiece: the pair with the best score first; of equals, the leftmost.

    `tokenizers` has no scores, only an order of pairs. All scores differ, except for those of runs
    of spaces, which are all equal. There the longest left part goes first: a run that is merged
    from the left has only one part that is longer than a space.
    """
    pieces: list[str] = tokenizer.pieces()
    scores: dict[str, float] = tokenizer.scores()
    merges = sorted(
        (-score, -cut, -len(piece), piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    special = {piece: id for id, piece in enumerate(pieces) if tokenizer.is_special(id)}
    content = _content(
        {piece: id for id, piece in enumerate(pieces)},
        special=special,
        merges=[f"{left} {right}" for *_, left, right in merges],
    )
    content["model"] |= {"unk_token": pieces[0], "byte_fallback": True}
    content["normalizer"] = _sequence(
        "normalizers",
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    )
    content["decoder"] = _sequence(
        "decoders",
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    )
    if whole := tokenizer.whole_pieces():
        # Pieces that sentencepiece extracts from a text before merging: cut around each of them,
        # then between all words, so that the rest can't be spelled like a control token and whole
        # words can be looked up.
        reserved = "|".join(map(re.escape, whole))
        content["pre_tokenizer"] = _sequence(
            "pretokenizers",
            _split(reserved),
            _split(f"{reserved}|{tokenizer.words}"),
        )
        content["model"]["ignore_merges"] = True
    return TokenizerJson(
        definition=_text(content),
        end_of_document=pieces[tokenizer.end_of_document],
        beginning=pieces[tokenizer.beginning],
        unknown=pieces[0],
    )


def _content(
    vocabulary: dict[str, int], *, special: dict[str, int], merges: list[str]
) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": content, **flags, "special": True}
            for content, id in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _sequence(parts: str, *each: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", parts: list(each)}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _byte_level() -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }


def _spelled_bytes() -> list[str]:
    """The character for each byte in byte-level vocabularies, as in GPT-2's."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    plain += range(ord("®"), ord("ÿ") + 1)
    spelled = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in spelled)
    spelled |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False)
