"""How building shards grows: with documents, with bytes of text, and with repeated documents.

`python -m benchmarks.scaling build`. One worker, so that a size's time is its work.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.scaling.case import Case
from data_pipeline import BuildSettings, build_shards
from data_pipeline.building.digests import RunWriter, num_ranges, repeated_in_range


def _words(num_bytes: int) -> Iterator[str]:
    """Yields documents of about that many bytes, of words as frequent as those of a language."""
    random = np.random.default_rng(0)
    letters = random.integers(97, 123, size=(20_000, 5), dtype=np.uint8)
    words = [row.tobytes().decode() for row in letters]
    while True:
        ranks = (random.pareto(1.0, size=num_bytes // 6) * 10).astype(np.int64) % len(words)
        yield " ".join([words[rank] for rank in ranks.tolist()])


def _write(path: Path, num_documents: int, num_bytes: int) -> None:
    with path.open("w") as file:
        for number, text in zip(range(num_documents), _words(num_bytes), strict=False):
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")


def _documents(size: int, folder: Path) -> None:
    _write(folder / "text.jsonl", size, 300)


def _megabytes(size: int, folder: Path) -> None:
    _write(folder / "text.jsonl", size * 10**6 // 5000, 5000)


def _long_document(size: int, folder: Path) -> None:
    text = "".join(text for text, _ in zip(_words(10**6), range(size), strict=False))
    (folder / "text.jsonl").write_text(
        json.dumps({"text": text}) + "\n" + json.dumps({"text": "a short one"}) + "\n"
    )


def _build(size: int, folder: Path, *, tokenizer: str) -> None:
    settings = BuildSettings(
        corpus=str(folder / "text.jsonl"),
        tokenizer=tokenizer,
        to=str(folder / f"shards-{len(list(folder.iterdir()))}"),
        num_processes=1,
        validation_fraction=0.0,
    )
    build_shards(settings, progress=False)


def _digests(size: int, folder: Path) -> None:
    """Writes the digests of ten parts, of which every tenth text is in two of them."""
    for part in range(10):
        runs = RunWriter(folder, f"part{part}")
        for seed, number in ((part, size // 11), (9 - part, size // 110)):
            digests = np.random.default_rng(seed).bytes(32 * number)
            for first in range(0, len(digests), 32):
                runs.add(digests[first : first + 32])
        runs.write()


def _compare(size: int, folder: Path) -> None:
    paths = sorted(folder.glob("part*.npy"))
    runs = [(int(path.name[4]), path) for path in paths]
    of = num_ranges(size)
    assert sum(len(repeated_in_range(runs, number=n, of=of)) for n in range(of)) > 0


CASES = (
    Case(
        name="build/documents",
        unit="documents of 300 bytes",
        sizes=(10_000, 50_000, 250_000),
        prepare=_documents,
        run=partial(_build, tokenizer="bytes"),
    ),
    Case(
        name="build/megabytes",
        unit="MB, Mixtral's tokenizer",
        sizes=(4, 16, 64),
        prepare=_megabytes,
        run=partial(_build, tokenizer="mixtral-v1"),
    ),
    Case(
        name="build/long_document",
        unit="MB of one document",
        sizes=(4, 16, 60),  # below 64 MiB, from which on a text is read twice,
        prepare=_long_document,
        run=partial(_build, tokenizer="bytes"),
    ),
    Case(
        name="build/deduplication",
        unit="digests",
        sizes=(100_000, 1_000_000, 8_000_000),
        prepare=_digests,
        run=_compare,
    ),
)
