"""Micro-batches, and the order in which a rank takes them through the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline import Batch
from moetrain.device_copies import to_device
from moetrain.model import Choose, Documents, LossSums, Transformer, random_stream
from moetrain.registries import ROUTERS
from moetrain.settings import Config


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The sequences that a rank takes through the model at once; all [sequences, seq_len]."""

    tokens: Tensor
    targets: Tensor
    valid: Tensor
    """Bool: which targets count."""
    sources: Tensor | None = None
    """The number of each sequence's source, [sequences] int64."""
    noise_seeds: Sequence[int] | None = None
    """The seeds of the routers' jitter, one per sequence; None: no jitter."""
    documents: Documents | None = None
    """The documents at whose ends attention stops; None: it crosses them."""
    choose: Choose | None = None
    """Chooses the experts instead of the routers."""

    @staticmethod
    def cut(
        batch: Batch,
        size: int,
        *,
        device: torch.device,
        mask_documents: bool = False,
        noise_seeds: Sequence[int] | None = None,
    ) -> "list[MicroBatch]":
        """Returns a rank's slice of a batch as micro-batches of `size` sequences, on the device."""
        starts = torch.from_numpy(batch.document_starts).split(size)
        arrays = (batch.tokens, batch.targets, batch.loss_mask)

        def on_device(array: npt.NDArray[Any]) -> tuple[Tensor, ...]:
            whole = to_device(torch.from_numpy(array), device)
            return tuple(whole.split(size))

        sources = on_device(batch.sources)
        pieces = zip(*(on_device(a) for a in arrays), sources, strict=True)
        return [
            MicroBatch(
                tokens=x,
                targets=y,
                valid=mask,
                sources=source,
                noise_seeds=noise_seeds and noise_seeds[number * size : (number + 1) * size],
                documents=Documents.of(starts[number], device=device) if mask_documents else None,
            )
            for number, (x, y, mask, source) in enumerate(pieces)
        ]

    def through(self, model: Transformer) -> LossSums:
        """Runs the model's forward pass and returns its loss sums."""
        sums: LossSums = model(
            self.tokens, self.targets, self.valid, self.noise_seeds, self.documents, self.choose
        )
        return sums


def noise_seeds(config: Config, samples: range) -> list[int] | None:
    """Returns a seed for each sample's noise, which depends only on its global number.

    None where no router uses noise.
    """
    router = config.model.router
    if not (router.jitter_noise or ROUTERS.get(router.name).made.draws_noise):
        return None
    return [random_stream(config.seed, "sample", sample) for sample in samples]


Schedule = Callable[
    [Sequence[MicroBatch], Callable[[MicroBatch], Tensor], Callable[[Tensor], None]], None
]
"""A schedule: takes micro-batches through a forward pass, which returns the loss, and backward."""


def one_after_another(
    micro_batches: Sequence[MicroBatch],
    forward: Callable[[MicroBatch], Tensor],
    backward: Callable[[Tensor], None],
) -> None:
    """Finishes each micro-batch before the next, so that only one's activations are in memory."""
    for batch in micro_batches:
        backward(forward(batch))
