"""The command `python -m data_pipeline.build`: text → WebDataset shards with an index."""

import time
from dataclasses import asdict

from data_pipeline.building.builder import build_shards
from data_pipeline.building.existing import existing_shards
from data_pipeline.commands.command import run_command
from data_pipeline.corpora.raw_documents import reading_report
from data_pipeline.quantities import decimal_size, duration
from data_pipeline.settings import BuildSettings
from data_pipeline.shards.index import SourceEntry
from data_pipeline.shards.unfinished import hidden_folder


def build(settings: BuildSettings) -> None:
    """Builds the folder and prints a short summary of its content."""
    if existing_shards(settings, progress=True) is not None:
        print(f"{settings.to} already holds these shards; nothing to do")
        return
    goes_on = hidden_folder(settings.to).exists()
    started = time.monotonic()
    folder = build_shards(settings)
    seconds = time.monotonic() - started
    for source in folder.index.sources:
        print(_summary(source))
    num_bytes = sum(folder.num_bytes(split) for split in ("train", "validation"))
    # If an earlier build was resumed, only part of the text was processed in this time.
    speed = "since it resumed" if goes_on else f"{decimal_size(num_bytes / seconds)}/s"
    print(
        f"{settings.to} is complete: {decimal_size(num_bytes)} of text in {duration(seconds)} "
        f"({speed})"
    )


def _summary(source: SourceEntry) -> str:
    splits = "".join(
        f"\n  {split}: "
        + (f"{entry.num_tokens:,} tokens, " if entry.num_tokens else "")
        + f"{entry.num_documents:,} documents, {entry.num_bytes:,} bytes of text"
        for split, entry in source.splits.items()
    )
    return f"{source.name} ({source.description}):{splits}\n  {reading_report(asdict(source))}"


if __name__ == "__main__":
    run_command(
        build,
        settings_type=BuildSettings,
        module="data_pipeline.build",
        about="Turns text into tokenised WebDataset shards with an index.",
        resumable=True,
    )
