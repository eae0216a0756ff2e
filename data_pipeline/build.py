"""The command `python -m data_pipeline.build`: text → tokenised WebDataset shards with an index."""

import time

from data_pipeline.builder import build_shards, existing_shards
from data_pipeline.command import run_command
from data_pipeline.index import SourceEntry
from data_pipeline.settings import BuildSettings


def build(settings: BuildSettings) -> None:
    """Builds the folder and says in a few lines what is in it."""
    existing = existing_shards(settings)
    if existing is not None:
        print(f"{settings.to} already holds these shards; nothing to do")
        return
    started = time.monotonic()
    folder = build_shards(settings)
    seconds = time.monotonic() - started
    for source in folder.index.sources:
        print(_summary(source))
    num_bytes = sum(folder.num_bytes(split) for split in ("train", "validation"))
    print(
        f"{settings.to} is complete: {num_bytes / 1e6:.1f} MB of text in {seconds:.1f} s "
        f"({num_bytes / seconds / 1e6:.1f} MB/s)"
    )


def _summary(source: SourceEntry) -> str:
    splits = ", ".join(
        f"{split} {entry.num_tokens:,} tokens of {entry.num_documents:,} documents"
        for split, entry in source.splits.items()
    )
    left_out = ", ".join(
        f"{number} {reason.replace('_', ' ')}" for reason, number in source.num_left_out.items()
    )
    return f"{source.name} ({source.description}): {splits}; left out: {left_out}"


if __name__ == "__main__":
    run_command(
        build,
        settings_type=BuildSettings,
        module="data_pipeline.build",
        about="Turns a corpus of text into tokenised WebDataset shards with an index.",
    )
