"""Building a large text part by part: workers read, encode and write the shards of their parts.

Owns the order of work, and joining the parts. Leaves the work on a part to `parts`, and where it is
done to `workers`. The parts, and so the bytes of the shards, depend on the text and the settings
alone, never on the number of workers or machines.

Memory doesn't grow with the text: this process holds a few figures of each part, a worker one
document and the digests of one range.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_pipeline.building.baselines import baselines_of
from data_pipeline.building.digests import num_ranges, repeated_in_part
from data_pipeline.building.parts import (
    HashedPart,
    Job,
    Part,
    PartToWrite,
    Range,
    WrittenPart,
    add_kept,
    compare_range,
    hash_part,
    range_path,
    read_baselines,
    read_part,
    write_part,
)
from data_pipeline.building.workers import Workers
from data_pipeline.corpora.corpus import Corpus
from data_pipeline.corpora.raw_documents import LeftOut
from data_pipeline.progress import byte_progress
from data_pipeline.shards.index import SPLITS, Baselines, ShardEntry, SplitEntry, shard_files
from data_pipeline.shards.unfinished import DocumentHash, UnfinishedBuild

_PART_BYTES = 2**26
_LARGEST_PART = 2**30
_MANY_PARTS = 4096


@dataclass(frozen=True, kw_only=True)
class JoinedSource:
    """A source whose parts were joined."""

    left_out: LeftOut
    splits: dict[str, SplitEntry]
    baselines: Baselines
    documents_hash: str


def parts_of(corpora: Mapping[str, Corpus], *, shard_tokens: int) -> list[Part] | None:
    """The parts of a text that is too large to be built in one piece; None for a smaller one.

    A part has about the text of a full shard, and more in a text of more than 4096 such parts.
    """
    num_bytes = sum(corpus.num_bytes for corpus in corpora.values())
    least = max(_PART_BYTES, 4 * shard_tokens)
    if num_bytes <= least:
        return None
    part_bytes = max(least, min(num_bytes // _MANY_PARTS, _LARGEST_PART))
    parts = [
        (name, number, part)
        for name, corpus in corpora.items()
        for number, part in enumerate(corpus.parts(part_bytes))
    ]
    return [
        Part(source=name, number=number, index=index, corpus=part)
        for index, (name, number, part) in enumerate(parts)
    ]


def compared_parts(
    job: Job, parts: Sequence[Part], workers: Workers, *, progress: bool
) -> list[PartToWrite]:
    """The first pass: all parts, with what of each is repeated in files of the job's folder."""
    hashed: dict[int, HashedPart] = {}
    num_bytes = sum(part.corpus.num_bytes for part in parts)
    with byte_progress("reading", num_bytes=num_bytes, shown=progress) as counter:
        for part, result in workers.results(hash_part, parts):
            hashed[part.index] = result
            counter.advance(part.corpus.num_bytes)
    of = num_ranges(sum(each.num_texts for each in hashed.values()))
    runs = tuple(
        (part.index, run) for part in parts for run in hashed[part.index].runs(job, part.stem)
    )
    num_repeated = np.zeros(len(parts), np.int64)
    ranges = [Range(number=number, of=of, runs=runs) for number in range(of)]
    for _, indices in workers.results(compare_range, ranges):
        num_repeated += np.bincount(indices, minlength=len(parts))
    return list(_in_sequence(parts, hashed, num_repeated, num_ranges=of))


def _in_sequence(
    parts: Sequence[Part],
    hashed: Mapping[int, HashedPart],
    num_repeated: NDArray[np.int64],
    *,
    num_ranges: int,
) -> Iterator[PartToWrite]:
    first_number = num_lines = 0
    for part in parts:
        if part.number == 0:
            first_number = 0
        first_line = num_lines if part.corpus.begins_inside else 0
        found = hashed[part.index]
        yield PartToWrite(
            part=part,
            hashed=found,
            num_ranges=num_ranges,
            first_number=first_number,
            first_line=first_line,
        )
        first_number += found.num_texts - int(num_repeated[part.index])
        is_one_file = part.corpus.begins_inside and len(part.corpus.files) == 1
        num_lines = found.num_lines + (first_line if is_one_file else 0)


def written_sources(
    unfinished: UnfinishedBuild,
    job: Job,
    parts: Sequence[Part],
    workers: Workers,
    *,
    progress: bool,
) -> dict[str, JoinedSource]:
    """Builds all parts that aren't complete, and joins their shards in the unfinished folder.

    Raises TextChanged if the text changes meanwhile.
    """
    given = compared_parts(job, parts, workers, progress=progress)
    num_bytes = sum(part.corpus.num_bytes for part in parts)
    with byte_progress("building", num_bytes=num_bytes, shown=progress) as counter:
        for done, _ in workers.results(write_part, given):
            counter.advance(done.part.corpus.num_bytes)
    return _joined(unfinished, job, given)


def documents_hashes(job: Job, given: Sequence[PartToWrite]) -> dict[str, str]:
    """The `DocumentHash` of each source, after the first pass."""
    hashes: dict[str, DocumentHash] = {}
    for each in given:
        ranges = (range_path(job, number) for number in range(each.num_ranges))
        repeated = repeated_in_part(ranges, each.part.index)
        add_kept(hashes.setdefault(each.part.source, DocumentHash()), job, each, repeated)
    return {name: documents_hash.hexdigest() for name, documents_hash in hashes.items()}


def _joined(
    unfinished: UnfinishedBuild, job: Job, given: Sequence[PartToWrite]
) -> dict[str, JoinedSource]:
    hashes = documents_hashes(job, given)
    moves: dict[str, str] = {}
    joined = {}
    for name, documents_hash in hashes.items():
        parts: list[tuple[Part, WrittenPart]] = []
        left_out = LeftOut()
        for each in given:
            if each.part.source == name:
                found = read_part(unfinished.parts / each.part.stem)
                assert found is not None, f"{each.part.stem} was just written"
                parts.append((each.part, found))
                left_out.add_record(found.left_out)
        joined[name] = JoinedSource(
            left_out=left_out,
            splits={split: _joined_split(name, split, parts, moves=moves) for split in SPLITS},
            baselines=baselines_of(
                read_baselines(unfinished.parts / part.stem, found) for part, found in parts
            ),
            documents_hash=documents_hash,
        )
    unfinished.move(moves)
    return joined


def _joined_split(
    source: str,
    split: str,
    parts: Sequence[tuple[Part, WrittenPart]],
    *,
    moves: dict[str, str],
) -> SplitEntry:
    """The entry of a split; adds to `moves` the new name of each file, by its place."""
    shards: list[ShardEntry] = []
    for part, written in parts:
        for shard in written.splits[split].shards:
            file, documents = shard_files(source, split, len(shards))
            moves[f"{part.stem}/{shard.file}"] = file
            moves[f"{part.stem}/{shard.documents}"] = documents
            shards.append(replace(shard, file=file, documents=documents))
    entries = [written.splits[split] for _, written in parts]
    return SplitEntry(
        num_documents=sum(entry.num_documents for entry in entries),
        num_tokens=sum(entry.num_tokens for entry in entries),
        num_bytes=sum(entry.num_bytes for entry in entries),
        shards=tuple(shards),
    )
