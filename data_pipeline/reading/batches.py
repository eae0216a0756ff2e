"""Batches: a rank's slice of a global batch, as a pure function of a sample index.

Owns the definition of a batch and which sequences are in it. Leaves sources to `mixture`, the order
of a source's sequences to `order`, their content to `packing`, and tokens to `reader`. Knows ranks
only as two integers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reading.mixture import (
    Mixture,
    MixturePosition,
    planned_stages,
    position_from,
    used_sources,
)
from data_pipeline.reading.packing import PackingReport, Pieces
from data_pipeline.reading.sources import open_source
from data_pipeline.settings import DataError, DataSettings
from data_pipeline.shards.documents import Documents
from data_pipeline.shards.reader import ShardFolder


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences to train or validate on: four arrays of the same shape [sequences, seq_len].

    `targets` holds the token after each of `tokens`. A position where `loss_mask` is False is
    padding, which counts neither in a loss nor in an expert load. `document_starts` is True where a
    document, the rest of one, or padding begins, and so at the first position of a sequence.
    `sources` [sequences] numbers the source of each, in the folder's order. `num_corrupt` of the
    sequences are all padding because one of their documents isn't what was written.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    document_starts: NDArray[np.bool_]
    sources: NDArray[np.int64]
    num_corrupt: int = 0

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """Where documents begin in the flattened batch, then its length: int32 [documents + 1]."""
        starts = np.flatnonzero(self.document_starts)
        return np.append(starts, self.document_starts.size).astype(np.int32)


class GlobalBatches:
    """The global batches of training, in an order that depends only on the seed and the settings.

    In an epoch of a source each of its tokens is a target exactly once. `position`, as returned by
    `position()` and kept in a checkpoint, says what was drawn before; without it all sources begin
    at their first sample. `stages` are the shares of the sources, as drawn. Thread-safe.

    Raises DataError for invalid settings, for a source with fewer tokens than one sequence needs,
    and for a position of a different order of samples.
    """

    def __init__(
        self,
        folder: ShardFolder,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        data: DataSettings,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        if seq_len < 1 or global_batch_size < 1:
            raise ValueError(f"{seq_len=} and {global_batch_size=} must be at least 1")
        self.global_batch_size = global_batch_size
        self._end_of_document = folder.tokenizer.end_of_document
        self._seq_len = seq_len
        self._max_epochs = data.max_epochs
        self._order = {
            "seed": seed,
            "train.seq_len": seq_len,
            "data.packing": data.packing.value,
            "data.shuffle_window": data.shuffle_window,
        }
        used = used_sources(data, sources=folder.sources)
        self._sources = {
            name: open_source(folder, name, seq_len=seq_len, seed=seed, data=data) for name in used
        }
        sizes = self.num_sequences
        self.stages = planned_stages(data, sizes=sizes)
        self._mixture = Mixture(
            folder.sources,
            stages=self.stages,
            samples_per_step=global_batch_size,
            position=None if position is None else self._checked(position),
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that are drawn from, in the folder's order."""
        return tuple(self._sources)

    @property
    def num_sequences(self) -> dict[str, int]:
        """The sequences in an epoch of each source that is drawn from."""
        return {name: source.sequences.num_sequences for name, source in self._sources.items()}

    def shares(self, step: int) -> dict[str, float]:
        """The shares of the sources in the samples of a step; they sum to one."""
        return [stage for stage in self.stages if stage.from_step <= step][-1].weights

    def report(self) -> dict[str, PackingReport]:
        """The result of packing, for each source that is drawn from."""
        return {name: source.sequences.report() for name, source in self._sources.items()}

    def read(self, first_sample: int, *, rank: int, num_ranks: int) -> Batch:
        """Rank's contiguous slice of the global batch that starts at global sample index.

        Arrays have global_batch_size / num_ranks sequences. Raises ValueError if that isn't an
        integer, for a rank outside range(num_ranks), and for a sample before the position's. Raises
        DataError for a document that isn't what was written, unless such documents are skipped.
        """
        slots = slots_of_rank(self.global_batch_size, rank=rank, num_ranks=num_ranks)
        indices = np.arange(first_sample + slots.start, first_sample + slots.stop, dtype=np.int64)
        of, numbers = self._mixture.assigned(indices)
        parts = []
        for source in self._sources.values():
            rows = np.flatnonzero(of == source.number)
            if len(rows):
                parts.append((rows, source.documents, source.pieces(numbers[rows])))
        return assembled(
            parts,
            sources=of.astype(np.int64),
            seq_len=self._seq_len,
            padding=self._end_of_document,
        )

    def drawn(self, next_sample: int) -> dict[str, int]:
        """How many of the samples before `next_sample` come from each source of the folder."""
        return self._mixture.drawn(next_sample)

    def position(self, next_sample: int) -> dict[str, Any]:
        """What a checkpoint must hold if the next step begins at `next_sample`; plain JSON.

        Raises ValueError if no step begins there.
        """
        return {**asdict(self._mixture.position(next_sample)), "order": self._order}

    def check_enough(self, num_samples: int) -> None:
        """Raises DataError if a source is exhausted before that many global samples are drawn.

        It is exhausted after `data.max_epochs` epochs; without that setting it never is.
        """
        if self._max_epochs is None:
            return
        for name, num_sequences in self.num_sequences.items():
            sample = self._mixture.first_after(
                name, number=floor(self._max_epochs * num_sequences), end=num_samples
            )
            if sample is not None:
                epochs = self.drawn(num_samples)[name] / num_sequences
                raise DataError(
                    f"source {name!r} has {num_sequences:,} sequences of {self._seq_len} tokens "
                    f"and is over at step {self._mixture.step_at(sample)} (sample {sample:,} of "
                    f"{num_samples:,}), because data.max_epochs={self._max_epochs:g}; the run "
                    f"would read it {epochs:.2f} times: allow that, lower its weight, train for "
                    "fewer steps, or give it more text"
                )

    def _checked(self, record: Mapping[str, Any]) -> MixturePosition:
        """The mixture's part of a position, if that has the same order of samples."""
        theirs = record.get("order", {})
        for key, value in self._order.items():
            if theirs.get(key) != value:
                raise DataError(
                    f"{key}={value} isn't the {theirs.get(key)} that this run was trained with: "
                    "the order of samples depends on it, and some would come twice; use that, or "
                    "another run.name"
                )
        return position_from({key: value for key, value in record.items() if key != "order"})


def slots_of_rank(batch_size: int, *, rank: int, num_ranks: int) -> range:
    """A rank's contiguous part of a batch's sequences; raises ValueError if it isn't an integer."""
    if not 0 <= rank < num_ranks:
        raise ValueError(f"{rank=} is not in range({num_ranks})")
    each, rest = divmod(batch_size, num_ranks)
    if rest:
        raise ValueError(f"a batch of {batch_size} sequences doesn't divide by {num_ranks} ranks")
    return range(rank * each, (rank + 1) * each)


def assembled(
    parts: Sequence[tuple[NDArray[np.int64], Documents, Pieces]],
    *,
    sources: NDArray[np.int64],
    seq_len: int,
    padding: int,
) -> Batch:
    """A batch of len(sources) sequences; each part fills the rows that it names."""
    shape = (len(sources), seq_len)
    dtype = parts[0][1].dtype
    stored = np.full(len(sources) * seq_len, padding, dtype=dtype)
    filled = np.zeros(len(sources), dtype=np.int64)
    corrupt = np.zeros(len(sources), dtype=np.bool_)
    firsts, befores = [], []  # where pieces begin, and the token before each
    for rows_of_part, documents, pieces in parts:
        rows = rows_of_part[pieces.rows]
        corrupt[rows[~documents.whole(pieces.documents)]] = True
        kept = np.flatnonzero(~corrupt[rows])
        rows, lengths, offsets = rows[kept], pieces.lengths[kept], pieces.offsets[kept]
        places = rows * seq_len + pieces.slots[kept]
        before = documents.read(pieces.documents[kept], offsets, lengths, out=stored, places=places)
        before[offsets == 0] = padding
        np.add.at(filled, rows, lengths)
        firsts.append(places)
        befores.append(before)
    short = np.flatnonzero(filled < seq_len)
    firsts.append(short * seq_len + filled[short])
    befores.append(np.full(len(short), padding))
    first = np.concatenate(firsts)

    targets = stored.astype(np.int64).reshape(shape)
    tokens = np.empty(shape, dtype=np.int64)
    tokens[:, 1:] = targets[:, :-1]
    tokens.reshape(-1)[first] = np.concatenate(befores)
    loss_mask = np.ones(shape, dtype=np.bool_)
    loss_mask[short] = np.arange(seq_len) < filled[short, None]
    document_starts = np.zeros(shape, dtype=np.bool_)
    document_starts.reshape(-1)[first] = True
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_mask=loss_mask,
        document_starts=document_starts,
        sources=sources,
        num_corrupt=int(corrupt.sum()),
    )
