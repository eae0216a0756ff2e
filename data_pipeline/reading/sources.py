"""Sources: a source's documents, how they are packed into sequences, and the sequences' order.

Owns opening a source for training as its settings say. Leaves mixing sources, and arrays of
batches, to `batches`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reading.order import Order
from data_pipeline.reading.packing import PackedDocuments, Pieces, packed
from data_pipeline.settings import DataError, DataSettings
from data_pipeline.shards.documents import Documents
from data_pipeline.shards.reader import ShardFolder


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of sequences, which are numbered in the order in which they are drawn.

    `number` is its place among the folder's sources.
    """

    number: int
    documents: Documents
    sequences: PackedDocuments
    order: Order

    def pieces(self, numbers: NDArray[np.int64]) -> Pieces:
        """The content of the sequences `numbers` [rows]."""
        _, positions = self.order.at(numbers)
        return self.sequences.pieces(positions)


def open_source(
    folder: ShardFolder, name: str, *, seq_len: int, seed: int, data: DataSettings
) -> Source:
    """A source of the folder, for training.

    Raises DataError if it has fewer tokens than one sequence needs.
    """
    documents = folder.documents("train", source=name, on_corrupt=data.on_corrupt)
    if documents.num_tokens < seq_len:
        others = "; or leave the source out, by naming the others in data.weights"
        raise DataError(
            f"the train split of {name!r} in {folder.location} has {documents.num_tokens} tokens, "
            f"fewer than one sequence of seq_len={seq_len}; use more text or shorter sequences"
            f"{others if len(folder.sources) > 1 else ''}"
        )
    sequences = packed(
        documents.starts,
        seq_len=seq_len,
        packing=data.packing,
        node=documents.node,
        made_of=documents.made_of,
    )
    order = Order(
        num_samples=sequences.num_sequences,
        seed=seed,
        source=name,
        block_size=-(-sequences.num_sequences // documents.num_shards),
        window=data.shuffle_window,
    )
    return Source(
        number=folder.sources.index(name), documents=documents, sequences=sequences, order=order
    )
