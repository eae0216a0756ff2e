"""The global batches that every layout trains on: the user's own text, or tokens from the seed."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline import Batch, DataError, open_folder, open_or_build, resolved_dir
from moetrain.checks import ConfigError
from moetrain.settings import Config
from moetrain.train.prepare import global_batches as training_batches
from moetrain.train.prepare import require_vocabulary


def global_batches(config: Config, *, num_steps: int) -> tuple[list[Batch], str]:
    """Returns one global batch per step, and a description of their source.

    They come from the user's shards, if those are built and fit the vocabulary, or are built now
    from the text in `data.dir`; else they are synthetic tokens. In both, later sequences end in
    more and more padding: ranks and micro-batches then hold different numbers of tokens. Otherwise
    a mean over each would look like the global mean.
    Raises ConfigError or DataError where `data.dir` is given and can't be used.
    """
    folder, given = resolved_dir(config.data), config.data.dir is not None
    why = f"{_short(folder)} is not built"
    if given or Path(folder).is_dir():
        try:
            return _from_shards(config, num_steps=num_steps), f"text of {_short(folder)}"
        except (ConfigError, DataError) as error:
            if given:
                raise
            why = str(error)
    batches = [_synthetic(config, step) for step in range(num_steps)]
    return batches, f"synthetic tokens of seed {config.seed} ({why})"


def _from_shards(config: Config, *, num_steps: int) -> list[Batch]:
    given = config.data.dir is not None  # else what is missing is not worth a build
    shards = open_or_build(config.data) if given else open_folder(config.data)
    require_vocabulary(config, shards.tokenizer)
    batches, size = training_batches(config, shards, position=None), config.train.global_batch_size
    whole = (batches.read(step * size, rank=0, num_ranks=1) for step in range(num_steps))
    return [_padded(batch) for batch in whole]


def _synthetic(config: Config, step: int) -> Batch:
    """Returns random tokens in documents of a quarter of a sequence, on average."""
    sequences, seq_len = config.train.global_batch_size, config.train.seq_len
    generator = np.random.default_rng([config.seed, step])
    text = generator.integers(0, config.model.vocab_size, (sequences, seq_len + 1))
    starts = generator.random((sequences, seq_len)) < 4 / seq_len
    starts[:, 0] = True
    return _padded(
        Batch(
            tokens=np.ascontiguousarray(text[:, :-1]),
            targets=np.ascontiguousarray(text[:, 1:]),
            loss_mask=np.ones((sequences, seq_len), dtype=np.bool_),
            document_starts=starts,
            sources=np.zeros(sequences, dtype=np.int64),
        )
    )


def _padded(batch: Batch) -> Batch:
    """Returns the batch with only the first 1 - i / 2n of sequence i of n counted."""
    sequences, seq_len = batch.tokens.shape
    kept = seq_len - np.arange(sequences) * seq_len // (2 * sequences)  # [sequences]
    return replace(batch, loss_mask=batch.loss_mask & (np.arange(seq_len) < kept[:, None]))


def _short(folder: str) -> str:
    path = Path(folder)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else folder
