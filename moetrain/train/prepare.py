"""What can be known to be wrong before any rank starts: data, vocabulary, an older run."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline import (
    Corpus,
    DataSettings,
    GlobalBatches,
    ShardFolder,
    Tokenizer,
    TokenizerEntry,
    open_or_build,
    shards_or_corpus,
    tokenizer_named,
)
from data_pipeline.commands.shell import text_setting
from data_pipeline.corpora.corpus_files import is_shard_folder
from data_pipeline.quantities import count
from moetrain.checkpoint.folders import candidates
from moetrain.checkpoint.manifest import CheckpointError, Manifest, read_manifest
from moetrain.checks import ConfigError
from moetrain.settings import Config, Resolved
from moetrain.train.preview import Preview, preview_of
from moetrain.train.resume import require_no_restart, require_same_model


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """How much of a source a run reads."""

    weights: dict[int, float]
    """Its share of the samples, by the step from which on it holds."""
    tokens: int
    """What it will have given at the end, in whole sequences."""
    epochs: float | None
    """How often the source will have been read at the end; None for text."""
    packing: dict[str, int] | None
    """What packing it came to, in counts; None for text."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The shards of a run, and what it will read of each of their sources that it draws from."""

    shards: ShardFolder
    plan: dict[str, SourcePlan]
    vocab_size: int
    """The model's, which may be more than the text's."""
    preview: Preview

    def lines(self) -> Iterator[str]:
        """Yields what a person is told of the model, the layout, the text and its vocabulary."""
        yield from self.preview.lines()
        if spare := self.vocab_size - self.shards.tokenizer.vocab_size:
            yield (
                f"vocabulary {self.vocab_size:,}: {self.shards.tokenizer.vocab_size:,} ids of "
                f"{self.shards.tokenizer.name}, and {spare:,} that are in no text"
            )
        for source, plan in self.plan.items():
            first, *later = plan.weights.items()
            text = f"source {source}: {count(plan.tokens)} tokens, {first[1]:.4g} of the samples"
            text += "".join(f", {weight:.4g} from step {step} on" for step, weight in later)
            if plan.packing:
                cut = plan.packing["num_cut_tokens"] / plan.packing["num_tokens"]
                text += f"; {plan.epochs:.3g} epochs by the end"
                text += f"; {cut:.1%} of its tokens are in documents that are cut"
            yield text


def prepare(config: Resolved, data: DataSettings, *, progress: bool) -> Prepared:
    """Returns the shards of a resolved configuration, built where `data` leaves that open.

    Raises ConfigError or DataError for shards that the model can't train on, for sources that
    can't be mixed as wanted, and for a run folder that holds another model or stands in another
    order of samples; nothing but the shards is written.
    """
    newest = newest_manifest(config.run_dir)
    _require_run(config, newest)
    if data.dir is None:  # shards may have to be built: not for a model that can't use them
        require_vocabulary(config, tokenizer_named(data.tokenizer))
        if newest and _were_elsewhere(config, newest):
            _require_built(config, newest, shards_or_corpus(data))
    return _prepared(config, open_or_build(data, progress=progress), newest)


def rehearse(config: Resolved, data: DataSettings, *, newest: Manifest | None) -> Prepared | Corpus:
    """Does what `prepare` does without a write: returns the corpus of shards that aren't built.

    `newest` is the manifest of the checkpoint that the run would go on from.
    """
    _require_run(config, newest)
    if data.dir is None:
        require_vocabulary(config, tokenizer_named(data.tokenizer))
    found = shards_or_corpus(data)
    if newest and _were_elsewhere(config, newest):
        _require_built(config, newest, found)
    return _prepared(config, found, newest) if isinstance(found, ShardFolder) else found


def _require_run(config: Resolved, newest: Manifest | None) -> None:
    """Raises ConfigError where a run's newest checkpoint isn't one to go on from as wanted."""
    if newest is None:
        return require_no_restart(config)
    if config.checkpoint.resume == "never":
        raise ConfigError(
            "checkpoint.resume",
            "never",
            f"run {config.run.name} has a checkpoint of step {newest.step}: use another "
            "run.name, or auto to go on from it",
        )
    return require_same_model(config, newest)


def _prepared(config: Resolved, shards: ShardFolder, newest: Manifest | None) -> Prepared:
    require_vocabulary(config, shards.tokenizer)
    if newest:
        _require_same_data(config, newest, shards)
    state: Mapping[str, Any] = newest.state if newest else {}
    batches = global_batches(config, shards, position=state.get("position"))
    steps = max(0, config.train.num_steps - state.get("step", 0))
    num_samples = state.get("samples", 0) + steps * config.train.global_batch_size
    batches.check_enough(num_samples)
    plan = _plan(batches, num_samples=num_samples, seq_len=config.train.seq_len)
    return Prepared(
        shards=shards,
        plan=plan,
        vocab_size=config.model.vocab_size,
        preview=preview_of(config),
    )


def global_batches(
    config: Config, shards: ShardFolder, *, position: Mapping[str, Any] | None
) -> GlobalBatches:
    """Returns the global batches of training, from a position if there is one.

    Raises DataError where a source can't be drawn from as wanted.
    """
    return GlobalBatches(
        shards,
        seq_len=config.train.seq_len,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        data=config.data,
        position=position or None,
    )


def _plan(batches: GlobalBatches, *, num_samples: int, seq_len: int) -> dict[str, SourcePlan]:
    drawn, report = batches.drawn(num_samples), batches.report()
    return {
        source: SourcePlan(
            weights={stage.from_step: stage.weights.get(source, 0.0) for stage in batches.stages},
            tokens=drawn[source] * seq_len,
            epochs=drawn[source] / report[source].num_sequences if source in report else None,
            packing=asdict(report[source]) if source in report else None,
        )
        for source in batches.sources
    }


def _require_same_data(config: Resolved, newest: Manifest, shards: ShardFolder) -> None:
    """Raises ConfigError where a run was trained on other tokens than those of the shards."""
    tokenizer = shards.tokenizer
    # A model that was imported has seen neither tokenizer nor shards of ours.
    before = newest.state.get("tokenizer") or tokenizer.fingerprint
    if before != tokenizer.fingerprint:
        raise ConfigError(
            "data.dir",
            shards.location,
            f"its text is in tokens of {tokenizer.name} with fingerprint "
            f"{tokenizer.fingerprint[:12]}, and run {config.run.name} was trained with a tokenizer "
            f"of fingerprint {before[:12]} up to step {newest.step}: what it learned means nothing "
            "in these tokens: use shards of that tokenizer, or another run.name",
        )
    if (newest.state.get("data") or shards.fingerprint) != shards.fingerprint:
        raise ConfigError(
            "data.dir",
            shards.location,
            f"run {config.run.name} was trained on other shards up to step {newest.step}, and "
            "where it stands means nothing in these: use those, or another run.name",
        )


def _were_elsewhere(config: Resolved, newest: Manifest) -> bool:
    """Returns whether a run was trained on shards of another folder, which are still there."""
    before = newest.config.get("data", {}).get("dir")
    has_seen = newest.state.get("data") is not None
    return has_seen and before not in (None, config.data.dir) and is_shard_folder(before)


def _require_built(config: Resolved, newest: Manifest, found: ShardFolder | Corpus) -> None:
    """Raises ConfigError where shards would be built for a run that was trained on others."""
    if isinstance(found, ShardFolder):
        return
    before = newest.config["data"]["dir"]
    raise ConfigError(
        "data.corpus",
        config.data.corpus,
        f"run {config.run.name} was trained on the shards in {before} up to step {newest.step}, "
        f"and others would have to be built for it: use {text_setting('data.dir', before)}, or "
        "another run.name",
    )


def require_vocabulary(config: Config, tokenizer: Tokenizer | TokenizerEntry) -> None:
    """Raises ConfigError where the text has ids that the model has no rows for."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"the text is in tokens of {tokenizer.name}, whose vocabulary has "
            f"{tokenizer.vocab_size}: use that size or a larger one, or another tokenizer "
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
