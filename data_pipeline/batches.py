"""Batches: a rank's slice of a global batch, as a pure function of a sample index.

Owns what a batch is and which sequences stand in it. Leaves tokens to `reader`, the order of
samples to `order`, and knows ranks only as two integers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.order import sample_indices
from data_pipeline.reader import ShardFolder, TokenStream
from data_pipeline.settings import DataError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences to train or validate on: four arrays of one shape [sequences, seq_len].

    `targets` holds the token after each of `tokens`; a place where `loss_mask` is False is
    padding, which counts neither in a loss nor in a load. `document_starts` is True where a
    document, what is left of one, or padding begins, and so at the first place of a sequence.
    `sources` [sequences] numbers the source of each, in the folder's order.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    document_starts: NDArray[np.bool_]
    sources: NDArray[np.int64]

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """Where documents begin in the flattened batch, and its length: int32 [documents + 1]."""
        starts = np.flatnonzero(self.document_starts)
        return np.append(starts, self.document_starts.size).astype(np.int32)


class GlobalBatches:
    """The global batches of training, in an order that only the seed decides.

    An epoch has `num_samples` sequences, in which each token of the split is a target exactly
    once; where `seq_len` doesn't divide the tokens, one sequence of an epoch ends in padding.
    A checkpoint needs to hold one integer, the index of the next sample.

    Raises DataError where the split has fewer tokens than one sequence needs.
    """

    def __init__(
        self,
        folder: ShardFolder,
        *,
        split: str,
        seq_len: int,
        global_batch_size: int,
        seed: int,
    ) -> None:
        if seq_len < 1 or global_batch_size < 1:
            raise ValueError(f"{seq_len=} and {global_batch_size=} must be at least 1")
        self._stream = folder.stream(split)
        self._end_of_document = folder.tokenizer.end_of_document
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._seed = seed
        if self._stream.num_tokens < seq_len:
            raise DataError(
                f"the {split} split of {folder.path} has {self._stream.num_tokens} tokens, fewer "
                f"than one sequence of seq_len={seq_len}; use more text or shorter sequences"
            )
        self.num_samples = -(-self._stream.num_tokens // seq_len)

    def read(self, first_sample: int, *, rank: int, num_ranks: int) -> Batch:
        """Rank's contiguous slice of the global batch that starts at global sample index.

        Arrays have global_batch_size / num_ranks sequences. Raises ValueError where that isn't
        whole, and for a rank outside range(num_ranks).
        """
        slots = _slots(self._global_batch_size, rank=rank, num_ranks=num_ranks)
        indices = np.arange(first_sample + slots.start, first_sample + slots.stop, dtype=np.int64)
        _, positions = sample_indices(indices, num_samples=self.num_samples, seed=self._seed)
        return _batch(
            self._stream,
            positions.tolist(),
            seq_len=self._seq_len,
            padding=self._end_of_document,
        )


class ValidationBatches:
    """The validation text of one source in stored order, each token a target exactly once.

    `batch_size` counts the sequences of a batch over all ranks. `num_batches` is the same for all
    ranks, whatever there is left for each; 0 where the source has no validation text.
    `max_sequences` stops earlier.
    """

    def __init__(
        self,
        folder: ShardFolder,
        *,
        source: str,
        seq_len: int,
        batch_size: int,
        max_sequences: int | None = None,
    ) -> None:
        if seq_len < 1 or batch_size < 1:
            raise ValueError(f"{seq_len=} and {batch_size=} must be at least 1")
        self._stream = folder.stream("validation", source=source)
        self._end_of_document = folder.tokenizer.end_of_document
        self._seq_len = seq_len
        self._batch_size = batch_size
        num_sequences = -(-self._stream.num_tokens // seq_len)
        if max_sequences is not None:
            num_sequences = min(num_sequences, max_sequences)
        self.num_sequences = num_sequences
        self.num_batches = -(-num_sequences // batch_size)

    def read(self, batch_number: int, *, rank: int, num_ranks: int) -> Batch:
        """Rank's contiguous slice of a batch; slots past the last sequence are all padding.

        Arrays have batch_size / num_ranks sequences. Raises ValueError where that isn't whole,
        and for a rank outside range(num_ranks).
        """
        slots = _slots(self._batch_size, rank=rank, num_ranks=num_ranks)
        first = batch_number * self._batch_size
        positions = [first + slot if first + slot < self.num_sequences else None for slot in slots]
        return _batch(self._stream, positions, seq_len=self._seq_len, padding=self._end_of_document)


def _slots(batch_size: int, *, rank: int, num_ranks: int) -> range:
    if not 0 <= rank < num_ranks:
        raise ValueError(f"{rank=} is not in range({num_ranks})")
    each, rest = divmod(batch_size, num_ranks)
    if rest:
        raise ValueError(f"a batch of {batch_size} sequences doesn't divide by {num_ranks} ranks")
    return range(rank * each, (rank + 1) * each)


def _batch(
    stream: TokenStream, positions: list[int | None] | list[int], *, seq_len: int, padding: int
) -> Batch:
    """The sequences at `positions` of the stored order, None for one that is all padding."""
    rows = np.empty((len(positions), seq_len + 1), dtype=np.int64)
    loss_mask = np.ones((len(positions), seq_len), dtype=np.bool_)
    for row, mask, position in zip(rows, loss_mask, positions, strict=True):
        filled = 0 if position is None else stream.read(position * seq_len, row)
        if filled <= seq_len:
            row[filled:] = padding
            mask[max(filled - 1, 0) :] = False
    tokens = np.ascontiguousarray(rows[:, :-1])
    # A document's first token is the target of the end of the one before it.
    document_starts = tokens == padding
    document_starts[:, 0] = True
    return Batch(
        tokens=tokens,
        targets=np.ascontiguousarray(rows[:, 1:]),
        loss_mask=loss_mask,
        document_starts=document_starts,
        sources=np.zeros(len(positions), dtype=np.int64),
    )
