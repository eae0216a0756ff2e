"""What a rank takes through the model at once, and in which order it does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline import Batch
from moetrain.model import Choose, Documents, LossSums, Transformer, random_stream
from moetrain.registries import ROUTERS
from moetrain.settings import Config


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What a rank takes through the model at once; all [sequences, seq_len]."""

    tokens: Tensor
    targets: Tensor
    valid: Tensor
    """Bool: which targets count."""
    noise_seeds: Sequence[int] | None = None
    """One for each sequence, for the routers' jitter; None: no jitter."""
    documents: Documents | None = None
    """What attention stops at the ends of; None: it crosses them."""
    choose: Choose | None = None
    """Chooses the experts in the routers' place."""

    @staticmethod
    def cut(
        batch: Batch,
        size: int,
        *,
        device: torch.device,
        mask_documents: bool = False,
        noise_seeds: Sequence[int] | None = None,
    ) -> "list[MicroBatch]":
        """Returns a rank's slice of a batch in pieces of `size` sequences, on the device."""
        starts = torch.from_numpy(batch.document_starts).split(size)
        arrays = (batch.tokens, batch.targets, batch.loss_mask)
        pieces = zip(*(torch.from_numpy(a).to(device).split(size) for a in arrays), strict=True)
        return [
            MicroBatch(
                tokens=x,
                targets=y,
                valid=mask,
                noise_seeds=noise_seeds and noise_seeds[number * size : (number + 1) * size],
                documents=Documents.of(starts[number], device=device) if mask_documents else None,
            )
            for number, (x, y, mask) in enumerate(pieces)
        ]

    def through(self, model: Transformer) -> LossSums:
        """Returns what one forward pass of the model makes of it."""
        sums: LossSums = model(
            self.tokens, self.targets, self.valid, self.noise_seeds, self.documents, self.choose
        )
        return sums


def noise_seeds(config: Config, samples: range) -> list[int] | None:
    """Returns a seed for each sample's noise, a function of its global number.

    None where no router draws any.
    """
    router = config.model.router
    if not (router.jitter_noise or ROUTERS.get(router.name).made.draws_noise):
        return None
    return [random_stream(config.seed, "sample", sample) for sample in samples]


Schedule = Callable[
    [Sequence[MicroBatch], Callable[[MicroBatch], Tensor], Callable[[Tensor], None]], None
]
"""Takes micro-batches through a forward pass, which returns the loss, and a backward pass."""


def one_after_another(
    micro_batches: Sequence[MicroBatch],
    forward: Callable[[MicroBatch], Tensor],
    backward: Callable[[Tensor], None],
) -> None:
    """Finishes each micro-batch before the next begins, so that one's activations are held."""
    for batch in micro_batches:
        backward(forward(batch))
