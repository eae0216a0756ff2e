"""Small corpora, the shard folders built from them, and what is in those."""

import io
import os
import tarfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import BuildSettings, ShardFolder, build_shards
from data_pipeline.progress import byte_progress
from data_pipeline.settings import CacheSettings
from data_pipeline.shards.verification import damaged_files, tokenizer_of
from data_pipeline.storage import ShardFiles, open_files


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


def build(corpus: Path | dict[str, Path], to: Path, **settings: Any) -> ShardFolder:
    """A folder of byte tokens with small shards, by default, of one source or more."""
    given: dict[str, Any] = (
        {"sources": {name: {"corpus": str(path)} for name, path in corpus.items()}}
        if isinstance(corpus, dict)
        else {"corpus": str(corpus)}
    )
    chosen = {"tokenizer": "bytes", "shard_tokens": 5000, "validation_fraction": 0.2, **settings}
    return build_shards(
        BuildSettings(to=str(to), **given, **chosen),
        progress=False,
    )


def documents_of(folder: ShardFolder, split: str, *, source: str | None = None) -> list[str]:
    """The texts of a split of a source (the first) in stored order, read without our reader."""
    tokenizer = tokenizer_of(files_of(folder), folder.index.tokenizer)
    texts = []
    for shard in folder.source(source or folder.sources[0]).splits[split].shards:
        with tarfile.open(folder.path / shard.file) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                tokens = np.load(io.BytesIO(file.read()))
                assert tokens[-1] == tokenizer.end_of_document
                texts.append(tokenizer.decode(tokens[:-1]))
    return texts


def files_of(folder: ShardFolder) -> ShardFiles:
    """The folder's files."""
    return open_files(str(folder.path), cache=CacheSettings())


def damaged(folder: ShardFolder) -> dict[str, str]:
    """What verification finds in a folder."""
    with byte_progress("verifying", num_bytes=1, shown=False) as counter:
        return damaged_files(files_of(folder), folder.index, counter=counter)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> ShardFolder:
    return build(corpus, tmp_path / "shards")


def in_child(work: Callable[[], object]) -> int:
    """Starts work in a forked process: a real one, without the seconds that imports take."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child
