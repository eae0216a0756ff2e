"""The command `python -m data_pipeline.inspect`: what a shard folder holds, verified."""

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from data_pipeline.command import run_command
from data_pipeline.reader import ShardFolder
from data_pipeline.settings import Count
from data_pipeline.tokenizers import tokenizer_named


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class InspectSettings:
    """`dir` is the folder; `verify` reads every byte; `sample_tokens` is a sample's length."""

    dir: str
    verify: bool = True
    sample_tokens: Count = 100


def inspect(settings: InspectSettings) -> None:
    """Prints tokens, documents, sources, baselines, hashes and a sample of the text."""
    folder = ShardFolder.open(settings.dir)
    made_by = folder.tokenizer
    print(f"{folder.path}: tokenizer {made_by.name}, vocabulary {made_by.vocab_size:,}")
    for source in folder.index.sources:
        print(f"{source.name}: {source.description}")
        print(f"  language: {source.language}, licence: {source.licence}")
        for split, entry in source.splits.items():
            print(
                f"  {split}: {entry.num_tokens:,} tokens, {entry.num_documents:,} documents, "
                f"{entry.num_bytes:,} bytes of text, {len(entry.shards)} shards"
            )
        print("  left out: " + ", ".join(f"{k} {v}" for k, v in source.num_left_out.items()))
        bigram, zlib = (
            source.baselines.byte_bigram_bits_per_byte,
            source.baselines.zlib_bits_per_byte,
        )
        if bigram is not None and zlib is not None:
            print(f"  bits per byte of validation: byte bigram {bigram:.3f}, zlib {zlib:.3f}")
    if settings.verify:
        folder.verify()
        print("hashes: every file verified")
    else:
        print("hashes: not verified (verify=true reads every byte)")
    _print_sample(folder, num_tokens=settings.sample_tokens)


def _print_sample(folder: ShardFolder, *, num_tokens: int) -> None:
    tokenizer = tokenizer_named(folder.tokenizer.name)
    for source in folder.sources:
        documents = folder.documents("train", source=source)
        if not documents.num_documents:
            continue
        tokens = documents.tokens(0)[:num_tokens]
        print(f"the first {len(tokens)} training tokens of {source}:\n{tokenizer.decode(tokens)}")


if __name__ == "__main__":
    run_command(
        inspect,
        settings_type=InspectSettings,
        module="data_pipeline.inspect",
        about="Shows what a shard folder holds, checks every hash and decodes a sample.",
    )
