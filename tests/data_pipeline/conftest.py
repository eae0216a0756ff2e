"""Small corpora and the shard folders built from them."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline import BuildSettings, ShardFolder, build_shards


def write_corpus(root: Path, *, num_documents: int = 60, seed: int = 0) -> list[str]:
    """Distinct documents of uneven lengths, in the order in which a build reads them."""
    random = np.random.default_rng(seed)
    root.mkdir()
    texts = []
    for number in range(num_documents):
        words = random.integers(0, 1000, size=int(random.integers(5, 120)))
        text = f"Dokument {number} für é:\n" + " ".join(f"w{word}" for word in words)
        (root / f"{number:04d}.txt").write_text(text, encoding="utf-8")
        texts.append(text)
    return texts


def build(corpus: Path, to: Path, **settings: object) -> ShardFolder:
    """A folder of byte tokens with small shards, unless told otherwise."""
    chosen = {"tokenizer": "bytes", "shard_tokens": 5000, "validation_fraction": 0.2, **settings}
    return build_shards(
        BuildSettings(corpus=str(corpus), to=str(to), **chosen),  # type: ignore[arg-type]
        progress=False,
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> ShardFolder:
    return build(corpus, tmp_path / "shards")
