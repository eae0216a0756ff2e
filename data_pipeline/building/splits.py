"""Splits: the fixed rule by which a document belongs to training or to validation."""


def split_of(digest: bytes, *, validation_fraction: float) -> str:
    """The split of a document, from the SHA-256 of its content alone.

    Whole percents decide first (`first four bytes, big-endian, mod 100`), so that anybody can check
    a split with sha256sum; the rest of the number refines them. Several rules were tried on the
    standard library. This one was kept because its held-out text is as compressible as the text
    that the toy's target was set on (docs/architecture.md has the figures).
    """
    rest, percent = divmod(int.from_bytes(digest[:4], "big"), 100)
    share = (percent + rest * 100 / 2**32) / 100
    return "validation" if share < validation_fraction else "train"
