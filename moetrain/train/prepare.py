"""What can be known to be wrong before any rank starts: data, vocabulary, an older run."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline import (
    DataSettings,
    GlobalBatches,
    ShardFolder,
    Tokenizer,
    TokenizerEntry,
    open_or_build,
    tokenizer_named,
)
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
    if data.dir is None:  # shards may have to be built: not for a model that can't use them
        _demand_vocabulary(config, tokenizer_named(data.tokenizer))
    shards = open_or_build(data, progress=progress)
    _demand_vocabulary(config, shards.tokenizer)
    if newest and newest.state.get("data") != shards.fingerprint:
        raise ConfigError(
            "data.dir",
            shards.path,
            f"run {config.run.name} was trained on other shards up to step {newest.step}, and "
            "where it stands means nothing in these: use those, or another run.name",
        )
    GlobalBatches(  # raises DataError where there are too few tokens
        shards,
        seq_len=config.train.seq_len,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        data=config.data,
    )
    return shards


def _demand_vocabulary(config: "Config", tokenizer: Tokenizer | TokenizerEntry) -> None:
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"the text is in tokens of {tokenizer.name}, whose vocabulary has "
            f"{tokenizer.vocab_size}: use that size, or another tokenizer "
            "(data.tokenizer, or python -m data_pipeline.build --help)",
        )


def newest_manifest(run_dir: Path) -> Manifest | None:
    """Returns the manifest of a run's newest readable checkpoint."""
    for folder in candidates(run_dir / "checkpoints"):
        try:
            return read_manifest(folder)
        except CheckpointError:
            continue  # the ranks will pass over it with an event that says why
    return None


def demand_same_model(config: "Config", manifest: Manifest) -> None:
    """Raises ConfigError where a checkpoint is of a model with another shape, or other samples."""
    for group, key in (("", "seed"), ("train", "seq_len")):
        ours, theirs = as_plain(config), manifest.config
        if group:
            ours, theirs = ours[group], theirs.get(group, {})
        if ours[key] != theirs.get(key):
            raise ConfigError(
                f"{group}.{key}".lstrip("."),
                ours[key],
                f"run {config.run.name} has {theirs.get(key)} up to step {manifest.step}, and the "
                "order of samples hangs on it; some would come twice: use another run.name",
            )
    ours, theirs = as_plain(config)["model"], manifest.config.get("model", {})
    for key, field in ModelSettings.__dataclass_fields__.items():
        free = key in ("router", "experts", "max_seq_len", "loss_chunk_size")
        # A checkpoint from before there was the setting is of a model with its default.
        if not free and ours[key] != theirs.get(key, field.default):
            raise ConfigError(
                f"model.{key}",
                ours[key],
                f"run {config.run.name} is of another model, whose {key} is {theirs.get(key)} "
                f"(its newest checkpoint is of step {manifest.step}): use that model, or another "
                "run.name",
            )
