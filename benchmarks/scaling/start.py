"""How a start and a batch grow with the number of documents of a folder.

`python -m benchmarks.scaling start batch`; `python -m benchmarks.scaling.start` prints what each
document takes in the memory of a rank and of a node. The folders have real tables and an index, and
shards without content.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.scaling.case import Case
from data_pipeline import DataSettings, GlobalBatches, ShardFolder
from data_pipeline.commands.standard_streams import ignore_broken_pipes
from data_pipeline.settings import CacheSettings, OnCorrupt, Packing
from data_pipeline.shards.index import (
    FORMAT_VERSION,
    Baselines,
    BuildEntry,
    Index,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TextEntry,
    sha256_of,
    shard_files,
    write_index,
)
from data_pipeline.tokenizers.named import tokenizer_named
from data_pipeline.tokenizers.tokenizer import TokenizerEntry

_DOCUMENTS_IN_SHARD = 100_000
_SEQ_LEN = 4096


def write_folder(folder: Path, num_documents: int) -> None:
    """Writes a folder whose shards are holes, of documents of 500 tokens on average."""
    random = np.random.default_rng(0)
    shards = []
    for number in range(-(-num_documents // _DOCUMENTS_IN_SHARD)):
        here = min(_DOCUMENTS_IN_SHARD, num_documents - number * _DOCUMENTS_IN_SHARD)
        lengths = random.integers(1, 1000, size=here)
        sizes = 1024 + (2 * lengths + 511) // 512 * 512
        table = np.stack([np.cumsum(sizes) - sizes + 640, lengths, np.zeros_like(lengths)], axis=1)
        file, documents = shard_files("text", "train", number)
        np.save(folder / documents, table.astype("<i8"))
        (folder / file).touch()
        os.truncate(folder / file, int(sizes.sum()))
        shards.append(
            ShardEntry(
                file=file,
                size=int(sizes.sum()),
                sha256="0" * 64,
                num_documents=here,
                num_tokens=int(lengths.sum()),
                num_bytes=4 * int(lengths.sum()),
                documents=documents,
                documents_sha256=sha256_of(folder / documents),
            )
        )
    write_index(_index(tuple(shards)), folder)


def _index(shards: tuple[ShardEntry, ...]) -> Index:
    tokenizer = tokenizer_named("bytes")
    empty = SplitEntry(num_documents=0, num_tokens=0, num_bytes=0, shards=())
    train = SplitEntry(
        num_documents=sum(shard.num_documents for shard in shards),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        shards=shards,
    )
    return Index(
        format_version=FORMAT_VERSION,
        build=BuildEntry(
            sources={"text": TextEntry(corpus="text", text_field="text")},
            tokenizer="bytes",
            end_of_document=None,
            validation_fraction=0.0,
            shard_tokens=2**24,
            on_corrupt=OnCorrupt.fail,
        ),
        tokenizer=TokenizerEntry(
            name=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            fingerprint=tokenizer.fingerprint,
        ),
        dtype="uint16",
        sources=(
            SourceEntry(
                name="text",
                description="invented",
                language=None,
                licence=None,
                num_left_out={},
                left_out_examples={},
                unknown_endings={},
                ending_examples={},
                splits={"train": train, "validation": empty},
                baselines=Baselines(byte_bigram_bits_per_byte=None, zlib_bits_per_byte=None),
            ),
        ),
    )


def _prepare(size: int, folder: Path) -> None:
    (folder / "shards").mkdir()
    write_folder(folder / "shards", size)


def _prepare_started(size: int, folder: Path) -> None:
    _prepare(size, folder)
    open_batches(folder)


def open_batches(folder: Path, *, packing: Packing = Packing.stream) -> GlobalBatches:
    """Opens a folder as a rank does."""
    cache = CacheSettings(dir=str(folder / "cache"))
    shards = ShardFolder.open(folder / "shards", cache=cache)
    data = DataSettings(packing=packing, on_corrupt=OnCorrupt.skip)
    return GlobalBatches(shards, seq_len=_SEQ_LEN, global_batch_size=32, seed=0, data=data)


def _first_start(size: int, folder: Path) -> None:
    """The first start on a node, which writes the index there."""
    cache = folder / f"cache-of-{os.getpid()}"
    cache.mkdir()
    (folder / "cache").unlink(missing_ok=True)
    (folder / "cache").symlink_to(cache)
    open_batches(folder)


def _start(size: int, folder: Path) -> None:
    open_batches(folder)


def _batch(size: int, folder: Path) -> None:
    """Reads batches; their documents fail the check, so that none of their tokens counts."""
    batches = open_batches(folder)
    for first in range(0, 320, 32):
        batches.read(first, rank=0, num_ranks=1)


_SIZES = (1_000_000, 4_000_000, 16_000_000)
CASES = (
    Case(
        name="start/documents_first",
        unit="documents",
        sizes=_SIZES,
        prepare=_prepare,
        run=_first_start,
    ),
    Case(
        name="start/documents",
        unit="documents",
        sizes=_SIZES[1:],
        prepare=_prepare_started,
        run=_start,
        max_exponent=1.0,
    ),
    Case(
        name="batch/documents",
        unit="documents",
        sizes=_SIZES[1:],
        prepare=_prepare_started,
        run=_batch,
        max_exponent=1.0,
    ),
)


def _resident() -> dict[str, int]:
    """This process's memory in bytes: of its own, and of files that it maps."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = {key: 1024 * int(size) for key, size in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return {"own": found["Anonymous"], "mapped": found["Rss"] - found["Anonymous"]}


def _rank(folder: Path, packing: Packing) -> None:
    before = _resident()
    batches = open_batches(folder, packing=packing)
    started = _resident()
    for first in range(0, 3200, 32):
        batches.read(first, rank=0, num_ranks=1)
    read = _resident()
    print(
        json.dumps(
            {
                f"{key}_{when}": now[key] - before[key]
                for key in before
                for when, now in (("started", started), ("read", read))
            }
        )
    )


def main() -> None:
    """Prints the bytes a document takes, with either packing."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling.start", description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[2_000_000, 20_000_000])
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        _rank(Path(arguments.rank[0]), Packing(arguments.rank[1]))
        return
    for packing in Packing:
        found = []
        for size in arguments.documents:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                _prepare(size, folder)
                command = [sys.executable, "-m", "benchmarks.scaling.start"]
                for when in ("first", "later"):  # of a node's ranks
                    rank = [*command, "--rank", str(folder), str(packing)]
                    ran = subprocess.run(rank, stdout=subprocess.PIPE, text=True, check=True)
                    case = {"documents": size, "packing": packing, "rank": when}
                    print(json.dumps(case | json.loads(ran.stdout)), flush=True)
                found.append((json.loads(ran.stdout), _files(folder / "cache")))
        (small, _), (large, _) = found[0], found[-1]
        more = arguments.documents[-1] - arguments.documents[0]
        own = (large["own_read"] - small["own_read"]) / more
        on_disk = found[-1][1] / arguments.documents[-1]
        print(json.dumps({"packing": packing, "own_bytes": own, "mapped_bytes_at_most": on_disk}))


def _files(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.npy"))


if __name__ == "__main__":
    ignore_broken_pipes()
    main()
