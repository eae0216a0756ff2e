"""Tokenizers by name: the tokenizer of a name, a path or a folder's index."""

import difflib
from pathlib import Path

from data_pipeline.settings import DataError
from data_pipeline.tokenizers.tokenizer import TOKENIZERS, Tokenizer, TokenizerEntry

_KINDS = "the path of a tokenizer.json, and, to build with, bpe:N"


def tokenizer_named(spec: str, *, end_of_document: str | None = None) -> Tokenizer:
    """The tokenizer of a name, or of a `tokenizer.json` by its path or its folder's.

    `end_of_document` names the token of a `tokenizer.json` that ends a document. If None: the
    `eos_token` of the `tokenizer_config.json` in the same folder, or a well-known name that the
    tokenizer has.

    Raises DataError for an unknown tokenizer, for a `tokenizer.json` that can't be used, and for an
    `end_of_document` that doesn't exist.
    """
    if spec in TOKENIZERS.names():
        if end_of_document is not None:
            raise DataError(
                f"end_of_document={end_of_document!r}: tokenizer={spec!r} has its own; leave it out"
            )
        return tokenizer_again(spec)
    path = Path(spec) / "tokenizer.json" if Path(spec).is_dir() else Path(spec)
    if path.is_file():
        from data_pipeline.tokenizers.json_tokenizer import read_tokenizer_json

        return read_tokenizer_json(path, end_of_document=end_of_document)
    raise DataError(_no_tokenizer(spec))


def resolved_tokenizer(spec: str) -> str:
    """The spec of a tokenizer with its path, if it is one, made absolute."""
    return (
        spec
        if spec in TOKENIZERS.names() or not Path(spec).exists()
        else str(Path(spec).absolute())
    )


def tokenizer_from(entry: TokenizerEntry, *, definition: bytes | None) -> Tokenizer:
    """The tokenizer that made a shard folder, from its index and the bytes of `entry.file`, if any.

    Raises DataError if its fingerprint isn't the one in the index.
    """
    text = None if definition is None else definition.decode("utf-8", errors="replace")
    if text is None and entry.name not in TOKENIZERS.names():
        raise DataError(
            f"the index names the tokenizer {entry.name!r} and no file that defines it: if it is "
            "an extension's, name its module in extensions=[…]; else build the folder again"
        )
    tokenizer = tokenizer_again(entry.name, definition=text, end_of_document=entry.end_of_document)
    if tokenizer.fingerprint != entry.fingerprint:
        where = "that name means here" if entry.file is None else f"{entry.file} defines"
        raise DataError(
            f"the shards were made by the tokenizer {entry.name!r} with the fingerprint "
            f"{entry.fingerprint[:12]}…, and the one that {where} has "
            f"{tokenizer.fingerprint[:12]}…; build the folder again"
        )
    return tokenizer


def tokenizer_again(
    name: str, *, definition: str | None = None, end_of_document: int | None = None
) -> Tokenizer:
    """A tokenizer from three of its attributes, which can be sent to another process."""
    # The others are imported where they are used, so that unused ones cost no time.
    if definition is not None:
        from data_pipeline.tokenizers.json_tokenizer import JsonTokenizer

        assert end_of_document is not None
        return JsonTokenizer(name, definition, end_of_document=end_of_document)
    return TOKENIZERS.get(name).made()


def _no_tokenizer(spec: str) -> str:
    if spec.startswith("bpe:"):
        return (
            f"tokenizer={spec!r} is trained on a corpus, by data_pipeline.build; elsewhere give "
            "the path of the tokenizer.json in the folder that was built"
        )
    if "/" in spec or spec.endswith(".json"):
        return (
            f"tokenizer={spec!r} doesn't exist: there is no such file, and no folder with a "
            f"tokenizer.json ({Path(spec).absolute()}); give the path of one, or one of "
            f"{', '.join(TOKENIZERS.names())}"
        )
    names = TOKENIZERS.names()
    nearest = difflib.get_close_matches(spec, names, n=1, cutoff=0.0)[0]
    return (
        f"tokenizer={spec!r} is not known; did you mean {nearest!r}? There are {', '.join(names)}, "
        f"{_KINDS}; one of your own is registered by a module named in extensions=[…]"
    )
