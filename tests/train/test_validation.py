"""Held-out loss: what counts in it, and how the sources' losses are pooled."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline import Batch
from moetrain.train.validation import pooled_loss, validate
from tests.parallel.test_parallelize import build, text
from tests.support.ranks import run_ranks

LOSSES, TOKENS = {"en": 2.0, "code": 1.0}, {"en": 100.0, "code": 300.0}


def test_sources_count_by_their_shares_of_the_mixture() -> None:
    assert pooled_loss(LOSSES, {"en": 0.75, "code": 0.25}, TOKENS) == 1.75
    assert pooled_loss(LOSSES, {"en": 0.5, "code": 0.25, "fr": 0.25}, TOKENS) == 5 / 3


def test_a_source_that_is_not_drawn_from_counts_for_nothing() -> None:
    assert pooled_loss(LOSSES, {"en": 1.0}, TOKENS) == 2.0


def test_without_weights_tokens_count() -> None:
    assert pooled_loss(LOSSES, {}, TOKENS) == 1.25
    assert pooled_loss(LOSSES, {"fr": 1.0}, TOKENS) == 1.25


class Held:
    """Validation batches of four sequences, of which the last is padding and others end in it."""

    bytes_per_token = 2.0
    num_batches = 1
    tokens = text().numpy()
    mask = np.arange(16) < np.array([16, 9, 3, 0])[:, None]

    def read(self, number: int, *, rank: int, num_ranks: int) -> Batch:
        part = slice(rank * 4 // num_ranks, (rank + 1) * 4 // num_ranks)
        return Batch(
            tokens=self.tokens[part, :-1],
            targets=self.tokens[part, 1:],
            loss_mask=self.mask[part],
            document_starts=np.zeros_like(self.mask[part]),
            sources=np.zeros(len(self.mask[part]), dtype=np.int64),
        )


def validated_and_by_hand() -> tuple[dict[str, float], float]:
    """Returns what validation says, and the mean loss over the valid targets."""
    model, meshes = build()
    held: Any = Held()
    said = validate(
        model, {"en": held}, weights=None, micro_batch_size=1, mask_documents=False,
        meshes=meshes, device=torch.device("cpu"),
    )  # fmt: skip
    tokens, valid = torch.from_numpy(Held.tokens), torch.from_numpy(Held.mask)
    logits = model(tokens[:, :-1])
    return said, float(F.cross_entropy(logits[valid], tokens[:, 1:][valid]))


@pytest.mark.trap(12)
@pytest.mark.parametrize("world", [1, 2])
def test_padding_counts_in_no_validation_loss(world: int) -> None:
    for said, mean in run_ranks(validated_and_by_hand, world):
        # A sum over 28 tokens in float32, each of a softmax over 64.
        assert said["validation/loss"] == pytest.approx(mean, rel=4 * 2**-23 * (28 + 64) ** 0.5)
        assert said["validation/en/loss"] == said["validation/loss"]
        bits = said["validation/loss"] / np.log(2) / 2
        assert said["validation/en/bits_per_byte"] == pytest.approx(bits, rel=1e-12)
