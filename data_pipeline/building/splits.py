"""Splits: the rule by which a document is for training or for validation, for good."""


def split_of(digest: bytes, *, validation_fraction: float) -> str:
    """The split of a document, from the SHA-256 of its content alone.

    Whole percents decide first (`first four bytes, big-endian, mod 100`), so that anybody can
    check a split with sha256sum; what remains of the number refines them. Of the rules tried on
    the standard library this one was kept because its held-out text is as compressible as the
    text that the toy's target was set on (docs/architecture.md has the figures).
    """
    rest, percent = divmod(int.from_bytes(digest[:4], "big"), 100)
    share = (percent + rest * 100 / 2**32) / 100
    return "validation" if share < validation_fraction else "train"
