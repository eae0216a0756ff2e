"""The command `python -m data_pipeline.inspect`: the content of a shard folder, verified."""

import json
from collections.abc import Iterator
from dataclasses import asdict, field
from enum import StrEnum
from typing import Any

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from data_pipeline.commands.command import run_command
from data_pipeline.corpora.raw_documents import reading_report
from data_pipeline.progress import byte_progress
from data_pipeline.settings import CacheSettings, Count, DataError, Natural, PathText
from data_pipeline.shards.index import Index, SourceEntry, read_index, shards_of
from data_pipeline.shards.reader import ShardFolder
from data_pipeline.shards.verification import damaged_files, open_table, tokenizer_of
from data_pipeline.storage import ShardFiles, open_files


class Format(StrEnum):
    """For people, or one JSON object."""

    text = "text"
    json = "json"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class InspectSettings:
    """`dir` is the folder; `verify` reads every byte of it.

    `num_samples` documents of each source, drawn by `seed`, are shown up to their first
    `sample_tokens` tokens.
    """

    dir: PathText
    verify: bool = True
    num_samples: Natural = 3
    sample_tokens: Count = 100
    seed: Natural = 0
    format: Format = Format.text
    cache: CacheSettings = field(default_factory=CacheSettings)


def inspect(settings: InspectSettings) -> None:
    """Prints the content of a folder, verifies it and shows samples of its text.

    Raises DataError naming each damaged file.
    """
    files = open_files(settings.dir, cache=settings.cache)
    index = read_index(files)
    report = _contents(files, index)
    if settings.verify:
        report["damaged"] = _damaged(files, index)
    else:  # raises DataError if a file is missing or doesn't have its full size
        ShardFolder.open(settings.dir, cache=settings.cache)
    if not report.get("damaged"):
        for number, source in enumerate(index.sources):
            report["sources"][number]["samples"] = _samples(files, index, number, source, settings)
    if settings.format is Format.json:
        print(json.dumps(report))
    else:
        for line in _lines(report):
            print(_printable(line))
    if report.get("damaged"):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report["damaged"].items())
        raise DataError(
            f"{files.location} is damaged: {reasons}. Restore it, or build the folder again"
        )


def _contents(files: ShardFiles, index: Index) -> dict[str, Any]:
    """Everything in the index, and what follows from it."""
    num_bytes = sum(shard.num_bytes for shard in shards_of(index))
    return {
        "dir": files.location,
        "tokenizer": asdict(index.tokenizer),
        "dtype": index.dtype,
        "build": asdict(index.build),
        "sources": [
            {
                "name": source.name,
                "description": source.description,
                "language": source.language,
                "licence": source.licence,
                "share": sum(split.num_bytes for split in source.splits.values()) / num_bytes,
                "splits": {
                    name: {
                        "num_tokens": split.num_tokens,
                        "num_documents": split.num_documents,
                        "num_bytes": split.num_bytes,
                        "bytes_per_token": (
                            split.num_bytes / split.num_tokens if split.num_tokens else None
                        ),
                        "num_shards": len(split.shards),
                    }
                    for name, split in source.splits.items()
                },
                "num_left_out": source.num_left_out,
                "left_out_examples": source.left_out_examples,
                "unknown_endings": source.unknown_endings,
                "ending_examples": source.ending_examples,
                "baselines": asdict(source.baselines),
            }
            for source in index.sources
        ],
    }


def _damaged(files: ShardFiles, index: Index) -> dict[str, str]:
    num_bytes = sum(shard.size for shard in shards_of(index))
    with byte_progress("verifying", num_bytes=num_bytes, shown=True) as counter:
        return damaged_files(files, index, counter=counter)


def _samples(
    files: ShardFiles, index: Index, number: int, source: SourceEntry, settings: InspectSettings
) -> list[dict[str, Any]]:
    """The beginnings of some documents of a source, the same for the same seed."""
    shards = [(split, shard) for split, entry in source.splits.items() for shard in entry.shards]
    ends = np.cumsum([shard.num_documents for _, shard in shards])
    total = int(ends[-1])
    random = np.random.default_rng([settings.seed, number])
    drawn = random.choice(total, size=min(settings.num_samples, total), replace=False)
    tokenizer, dtype = tokenizer_of(files, index.tokenizer), np.dtype(index.dtype)
    samples = []
    for document in sorted(drawn.tolist()):
        place = int(ends.searchsorted(document, side="right"))
        split, shard = shards[place]
        table = open_table(files, shard)
        offset, length, _ = table[document - int(ends[place])].tolist()  # from the end, so negative
        with files.open(shard.file, size=shard.size, sha256=shard.sha256) as file:
            file.seek(offset)
            shown = min(length, settings.sample_tokens)
            text = tokenizer.decode(np.frombuffer(file.read(shown * dtype.itemsize), dtype))
        cut = shown < length
        samples.append(
            {"split": split, "file": shard.file, "length": length, "text": text, "cut": cut}
        )
    return samples


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    made_by = report["tokenizer"]
    yield (
        f"{report['dir']}: tokenizer {made_by['name']}, vocabulary {made_by['vocab_size']:,}, "
        f"{report['dtype']}"
    )
    for source in report["sources"]:
        yield f"{source['name']}: {source['description']}"
        yield (
            f"  language: {source['language'] or 'not given'}, "
            f"licence: {source['licence'] or 'not given'}, {source['share']:.1%} of the text"
        )
        for name, split in source["splits"].items():
            tokens = (
                f"{split['num_tokens']:,} tokens ({split['bytes_per_token']:.3f} bytes each), "
                if split["num_tokens"]
                else ""
            )
            yield (
                f"  {name}: {tokens}{split['num_documents']:,} documents, "
                f"{split['num_bytes']:,} bytes of text, shards: {split['num_shards']}"
            )
        yield f"  {reading_report(source)}"
        bigram, zlib = source["baselines"].values()
        if bigram is not None and zlib is not None:
            yield f"  bits per byte of validation: byte bigram {bigram:.3f}, zlib {zlib:.3f}"
    if "damaged" not in report:
        yield "not verified (verify=true reads every byte)"
    elif not report["damaged"]:
        yield "every file verified"
    for source in report["sources"]:
        for sample in source.get("samples", []):
            yield f"--- {source['name']}, {sample['split']}: {sample['length']:,} tokens"
            yield sample["text"] + (" […cut]" if sample["cut"] else "")


def _printable(line: str) -> str:
    """Without terminal control characters: the text is untrusted."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in line
    )


if __name__ == "__main__":
    run_command(
        inspect,
        settings_type=InspectSettings,
        module="data_pipeline.inspect",
        about="Shows what a shard folder holds, verifies every byte and decodes samples.",
    )
