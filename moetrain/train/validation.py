"""Held-out loss, source by source: every rank takes its share, none counts a token twice."""

import math

import torch

from data_pipeline import DataSettings, ShardFolder, ValidationBatches
from moetrain.model import Transformer
from moetrain.parallel import reshard, sum_over_ranks
from moetrain.train.step import MicroBatch


@torch.no_grad()
def validate(
    model: Transformer,
    folder: ShardFolder,
    *,
    seq_len: int,
    data: DataSettings,
    micro_batch_size: int,
    max_sequences: int | None,
    rank: int,
    num_ranks: int,
    device: torch.device,
) -> dict[str, float]:
    """Returns `validation/loss` and each source's `validation/<source>/loss` and `bits_per_byte`.

    Losses are means over tokens in nats, the first over those of all sources. Bits per byte count
    all tokens, the ends of documents too, against the bytes of the text; they take the split's
    bytes a token, which is exact where the whole split is read.
    """
    metrics: dict[str, float] = {}
    all_nats = all_tokens = 0.0
    for source in folder.sources:
        batches = ValidationBatches(
            folder,
            source=source,
            seq_len=seq_len,
            batch_size=micro_batch_size * num_ranks,
            max_sequences=max_sequences,
            on_corrupt=data.on_corrupt,
        )
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
        for number in range(batches.num_batches):
            batch = batches.read(number, rank=rank, num_ranks=num_ranks)
            for part in MicroBatch.cut(
                batch, micro_batch_size, device=device, mask_documents=data.mask_documents
            ):
                sums += _nats_and_tokens(model, part)
        nats, tokens = sum_over_ranks(sums).tolist()
        if not tokens:
            continue
        metrics[f"validation/{source}/loss"] = nats / tokens
        metrics[f"validation/{source}/bits_per_byte"] = (
            nats / tokens / math.log(2) / batches.bytes_per_token
        )
        all_nats, all_tokens = all_nats + nats, all_tokens + tokens
    reshard(model)  # a forward pass without a backward one leaves the root's weights gathered
    if all_tokens:
        metrics = {"validation/loss": all_nats / all_tokens, **metrics}
    return metrics


def _nats_and_tokens(model: Transformer, batch: MicroBatch) -> torch.Tensor:
    output = batch.through(model)
    return torch.stack((output.cross_entropy.double(), batch.valid.sum().double()))
