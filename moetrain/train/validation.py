"""Held-out loss by source: every rank takes its share, and no token counts twice."""

import math
from collections.abc import Mapping

import torch

from data_pipeline import ValidationBatches
from moetrain.model import Transformer
from moetrain.parallel import TOKEN_AXES, Meshes, reshard
from moetrain.train.micro_batch import MicroBatch


@torch.no_grad()
def validate(
    model: Transformer,
    held_out: Mapping[str, ValidationBatches],
    *,
    weights: Mapping[str, float] | None,
    micro_batch_size: int,
    mask_documents: bool,
    meshes: Meshes,
    device: torch.device,
) -> dict[str, float]:
    """Returns `validation/loss` and each source's `validation/<source>/loss` and `bits_per_byte`.

    Losses are means over tokens, in nats. `validation/loss` is the mean over sources by `weights`,
    where a source without a weight has weight 0; without weights, or if all are 0, it is the mean
    over all tokens. Bits per byte count all tokens, the ends of documents too, against the bytes of
    the text that they encode.
    """
    metrics: dict[str, float] = {}
    share = {"rank": meshes.share.batch_rank, "num_ranks": meshes.topology.num_batch_ranks}
    losses, all_tokens = dict[str, float](), dict[str, float]()
    for source, batches in held_out.items():
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes of text
        counts = batches.bytes_per_token is None
        for number in range(batches.num_batches):
            batch = batches.read(number, **share)
            for part in MicroBatch.cut(
                batch, micro_batch_size, device=device, mask_documents=mask_documents
            ):
                sums[:2] += _nats_and_tokens(model, part)
            sums[2] += batches.num_bytes(number, **share) if counts else 0
        nats, tokens, num_bytes = meshes.sum(sums, over=TOKEN_AXES).tolist()
        if not tokens:
            continue
        losses[source], all_tokens[source] = nats / tokens, tokens
        metrics[f"validation/{source}/loss"] = nats / tokens
        if bytes_per_token := batches.bytes_per_token or num_bytes / tokens:
            bits = nats / tokens / math.log(2)
            metrics[f"validation/{source}/bits_per_byte"] = bits / bytes_per_token
    reshard(model)  # a forward pass without a backward one leaves the root's weights gathered
    if losses:
        metrics = {"validation/loss": pooled_loss(losses, weights or {}, all_tokens), **metrics}
    return metrics


def pooled_loss(
    losses: Mapping[str, float], weights: Mapping[str, float], tokens: Mapping[str, float]
) -> float:
    """Returns the mean of the sources' losses by weights; by tokens if all weights are 0."""
    used = {source: weights.get(source, 0.0) for source in losses}
    if not any(used.values()):
        used = dict(tokens)
    return sum(losses[source] * used[source] for source in losses) / sum(used.values())


def _nats_and_tokens(model: Transformer, batch: MicroBatch) -> torch.Tensor:
    output = batch.through(model)
    return torch.stack((output.cross_entropy.double(), batch.valid.sum().double()))
