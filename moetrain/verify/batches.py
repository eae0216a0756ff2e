"""The global batches that every layout trains on: the user's own text, or tokens from the seed."""

from pathlib import Path

import numpy as np

from data_pipeline import Batch, DataError, GlobalBatches, ShardFolder, resolved_dir
from moetrain.checks import ConfigError
from moetrain.config import Config


def global_batches(config: Config, *, num_steps: int) -> tuple[list[Batch], str]:
    """Returns one global batch a step, and what they are made of.

    The user's shards where they are built and fit the vocabulary, else synthetic tokens. In both
    the later sequences end in padding, more and more of it: ranks and micro-batches then hold
    unlike numbers of tokens, without which a mean over each would look like the global mean.
    Raises ConfigError or DataError where `data.dir` is given and can't be used.
    """
    folder = resolved_dir(config.data)
    given = config.data.dir is not None
    why = f"{_short(folder)} is not built"
    if given or folder.is_dir():
        try:
            return _from_shards(folder, config, num_steps=num_steps), f"text of {_short(folder)}"
        except (ConfigError, DataError) as error:
            if given:
                raise
            why = str(error)
    batches = [_synthetic(config, step) for step in range(num_steps)]
    return batches, f"synthetic tokens of seed {config.seed} ({why})"


def _from_shards(folder: Path, config: Config, *, num_steps: int) -> list[Batch]:
    shards = ShardFolder.open(str(folder), on_corrupt=config.data.on_corrupt)
    if shards.tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"the text of {_short(folder)} is in tokens of {shards.tokenizer.name}, whose "
            f"vocabulary has {shards.tokenizer.vocab_size}: use that size, or other shards",
        )
    size = config.train.global_batch_size
    batches = GlobalBatches(
        shards,
        seq_len=config.train.seq_len,
        global_batch_size=size,
        seed=config.seed,
        data=config.data,
    )
    whole = [batches.read(step * size, rank=0, num_ranks=1) for step in range(num_steps)]
    return [_padded(b.tokens, b.targets, b.loss_mask) for b in whole]


def _synthetic(config: Config, step: int) -> Batch:
    shape = (config.train.global_batch_size, config.train.seq_len + 1)
    generator = np.random.default_rng([config.seed, step])
    text = generator.integers(0, config.model.vocab_size, shape)
    return _padded(text[:, :-1], text[:, 1:], np.ones(text[:, 1:].shape, dtype=np.bool_))


def _padded(tokens: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> Batch:
    """Returns a batch of which sequence i of n counts only its first 1 - i / 2n."""
    sequences, seq_len = tokens.shape
    kept = seq_len - np.arange(sequences) * seq_len // (2 * sequences)  # [sequences]
    mask = mask & (np.arange(seq_len) < kept[:, None])
    return Batch(
        tokens=np.ascontiguousarray(tokens),
        targets=np.ascontiguousarray(targets),
        loss_mask=mask,
        document_starts=np.arange(seq_len) == np.zeros((sequences, 1), np.int64),
        sources=np.zeros(sequences, np.int64),
    )


def _short(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
