"""The checks before any rank starts: data, vocabulary, an existing run."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from data_pipeline import (
    DataSettings,
    GlobalBatches,
    PlannedBuild,
    ShardFolder,
    Tokenizer,
    TokenizerEntry,
    builds_shards,
    opened_or_planned,
    tokenizer_named,
)
from data_pipeline.commands.shell import text_setting
from data_pipeline.corpora.corpus_files import is_shard_folder, is_text
from data_pipeline.quantities import count
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.trained import newest_manifest
from moetrain.checks import ConfigError
from moetrain.settings import Config, Resolved
from moetrain.train.preview import Preview, preview_of
from moetrain.train.resume import require_no_restart, require_same_model


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """How much of a source a run reads."""

    weights: dict[int, float]
    """Its share of the samples, by the step from which the share applies."""
    tokens: int
    """The whole sequences that will have been read at the end."""
    epochs: float
    """The epochs of the source at the end."""
    packing: dict[str, int]
    """Counts of its packing."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The shards of a run, and how much it will read of each source that it draws from."""

    config: Resolved
    """The run's configuration, whose `data.dir` is the folder that ranks open."""
    shards: ShardFolder
    plan: dict[str, SourcePlan]

    @property
    def preview(self) -> Preview:
        """What it will train."""
        return preview_of(self.config)

    def lines(self) -> Iterator[str]:
        """Yields the lines to print on the model, the layout, the text and its vocabulary."""
        yield from self.preview.lines()
        vocab_size = self.config.model.vocab_size
        if spare := vocab_size - self.shards.tokenizer.vocab_size:
            yield (
                f"vocabulary {vocab_size:,}: {self.shards.tokenizer.vocab_size:,} ids of "
                f"{self.shards.tokenizer.name}, and {spare:,} that are in no text"
            )
        for source, plan in self.plan.items():
            first, *later = plan.weights.items()
            text = f"source {source}: {count(plan.tokens)} tokens, {first[1]:.4g} of the samples"
            text += "".join(f", {weight:.4g} from step {step} on" for step, weight in later)
            cut = plan.packing["num_cut_tokens"] / plan.packing["num_tokens"]
            text += f"; {plan.epochs:.3g} epochs by the end"
            text += f"; {cut:.1%} of its tokens are in documents that are cut"
            yield text


def prepare(config: Resolved, data: DataSettings, *, progress: bool) -> Prepared:
    """Returns the shards of a resolved configuration, built where `data` doesn't name any.

    Raises ConfigError or DataError for shards that the model can't train on, for sources that can't
    be mixed as configured, and for a run folder with another model or another order of samples.
    Only shards are written.
    """
    newest = newest_manifest(config.run_dir)
    found = _found(config, data, newest, progress=progress)
    shards = found if isinstance(found, ShardFolder) else found.build(progress=progress)
    return _prepared(config, shards, newest)


def rehearse(
    config: Resolved, data: DataSettings, *, newest: Manifest | None
) -> Prepared | PlannedBuild:
    """Does what `prepare` does without writing: returns the planned build of missing shards.

    `newest` is the manifest of the checkpoint that the run would resume from.
    """
    found = _found(config, data, newest, progress=False)
    return _prepared(config, found, newest) if isinstance(found, ShardFolder) else found


def on_shards(config: Resolved, found: ShardFolder | PlannedBuild) -> Resolved:
    """Returns the configuration with a text's shards as `data.dir`, and the text as `data.corpus`.

    A configuration whose `data.dir` is a folder of shards is returned unchanged.
    """
    if not is_text(config.data.dir):
        return config
    folder = found.location if isinstance(found, ShardFolder) else found.settings.to
    return replace(config, data=replace(config.data, dir=folder, corpus=config.data.dir))


def _found(
    config: Resolved, data: DataSettings, newest: Manifest | None, *, progress: bool
) -> ShardFolder | PlannedBuild:
    """Returns the shards of a run, or the plan of their build.

    Raises ConfigError for errors that are known before shards are built, which may take hours.
    """
    _require_run(config, newest)
    if builds_shards(data):
        require_vocabulary(config, tokenizer_named(data.tokenizer))
    found = opened_or_planned(data, progress=progress)
    if isinstance(found, PlannedBuild) and newest and _were_elsewhere(config, newest):
        _refuse_build(config, newest, found)
    return found


def _require_run(config: Resolved, newest: Manifest | None) -> None:
    """Raises ConfigError where the run can't resume from its newest checkpoint as configured."""
    if newest is None:
        return require_no_restart(config)
    if config.checkpoint.resume == "never":
        raise ConfigError(
            "checkpoint.resume",
            "never",
            f"run {config.run.name} has a checkpoint of step {newest.step}: use another "
            "run.name, or auto to resume from it",
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
    return Prepared(config=on_shards(config, shards), shards=shards, plan=plan)


def global_batches(
    config: Config, shards: ShardFolder, *, position: Mapping[str, Any] | None
) -> GlobalBatches:
    """Returns the global batches of training, from a position if there is one.

    Raises DataError where a source can't be drawn from as configured.
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
            epochs=drawn[source] / report[source].num_sequences,
            packing=asdict(report[source]),
        )
        for source in batches.sources
    }


def _require_same_data(config: Resolved, newest: Manifest, shards: ShardFolder) -> None:
    """Raises ConfigError where a run was trained on other tokens than those of the shards."""
    tokenizer = shards.tokenizer
    # An imported model wasn't trained on shards of this project.
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
        others = f" ({text_setting('data.dir', before)})" if (before := _before(newest)) else ""
        raise ConfigError(
            "data.dir",
            shards.location,
            f"run {config.run.name} was trained on other shards up to step {newest.step}, and "
            f"where it stands means nothing in these: use those{others}, or another run.name",
        )


def _were_elsewhere(config: Resolved, newest: Manifest) -> bool:
    """Returns whether a run was trained on shards of another folder that still exists."""
    return newest.state.get("data") is not None and _before(newest) not in (None, config.data.dir)


def _before(newest: Manifest) -> str | None:
    """Returns the folder of the shards that a run was trained on, if it still exists."""
    before = newest.config.get("data", {}).get("dir")
    return before if before and is_shard_folder(before) else None


def _refuse_build(config: Resolved, newest: Manifest, found: PlannedBuild) -> NoReturn:
    """Raises ConfigError where shards would be built for a run that was trained on others."""
    before = _before(newest)
    why = f", because the text has changed since ({found.change})" if found.change else " for it"
    raise ConfigError(
        found.named_by,
        found.settings.corpus,
        f"run {config.run.name} was trained on the shards in {before} up to step {newest.step}, "
        f"and others would have to be built{why}: use {text_setting('data.dir', str(before))}, or "
        "another run.name",
    )


def require_vocabulary(config: Config, tokenizer: Tokenizer | TokenizerEntry) -> None:
    """Raises ConfigError where the text has ids beyond the model's vocabulary."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"the text is in tokens of {tokenizer.name}, whose vocabulary has "
            f"{tokenizer.vocab_size}: use that size or a larger one, or another tokenizer "
            "(data.tokenizer, or python -m data_pipeline.build --help)",
        )
