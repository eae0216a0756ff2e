"""What can be known to be wrong before any rank starts: data, vocabulary, an older run."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline import DataSettings, GlobalBatches, ShardFolder, open_or_build
from moetrain.checkpoint import CheckpointError, Manifest, candidates, read_manifest
from moetrain.checks import ConfigError
from moetrain.model import ModelSettings

if TYPE_CHECKING:
    from moetrain.config import Config


def as_plain(config: "Config") -> dict[str, Any]:
    """Returns the configuration as nested dictionaries of JSON values."""
    return asdict(config)


def prepare(config: "Config", data: DataSettings, *, progress: bool) -> ShardFolder:
    """Returns the shards of a resolved configuration, built where `data` leaves that open.

    Raises ConfigError or DataError for shards that the model can't train on, and for a run
    folder that holds another model; nothing but the shards is written.
    """
    newest = newest_manifest(Path(config.run.dir, config.run.name or ""))
    if newest:
        if config.checkpoint.resume == "never":
            raise ConfigError(
                "checkpoint.resume",
                "never",
                f"run {config.run.name} has a checkpoint of step {newest.step}: use another "
                "run.name, or auto to go on from it",
            )
        demand_same_model(config, newest)
    shards = open_or_build(data, progress=progress)
    tokenizer = shards.tokenizer
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"the shards in {shards.path} were made with tokenizer {tokenizer.name}, whose "
            f"vocabulary has {tokenizer.vocab_size}: use that size, or build shards with another "
            "tokenizer (python -m data_pipeline.build --help)",
        )
    GlobalBatches(  # raises DataError where there are too few tokens
        shards,
        split="train",
        seq_len=config.train.seq_len,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
    )
    return shards


def newest_manifest(run_dir: Path) -> Manifest | None:
    """Returns the manifest of a run's newest readable checkpoint."""
    for folder in candidates(run_dir / "checkpoints"):
        try:
            return read_manifest(folder)
        except CheckpointError:
            continue  # the ranks will pass over it with an event that says why
    return None


def demand_same_model(config: "Config", manifest: Manifest) -> None:
    """Raises ConfigError where a checkpoint is of a model with another shape."""
    ours, theirs = as_plain(config)["model"], manifest.config.get("model", {})
    for key in ModelSettings.__dataclass_fields__:
        free = key in ("router", "experts", "max_seq_len", "loss_chunk_size")
        if not free and ours[key] != theirs.get(key):
            raise ConfigError(
                f"model.{key}",
                ours[key],
                f"run {config.run.name} is of another model, whose {key} is {theirs.get(key)} "
                f"(its newest checkpoint is of step {manifest.step}): use that model, or another "
                "run.name",
            )
