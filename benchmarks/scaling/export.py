"""Writing the many tensors of an export: a matrix for each expert of each layer."""

from pathlib import Path

import torch

from benchmarks.scaling.case import Case
from moetrain.huggingface.names import TensorPlace
from moetrain.huggingface.shards import write_shards


def _write(size: int, folder: Path) -> None:
    placed = [
        TensorPlace(theirs=f"model.layers.{n}.weight", theirs_shape=(4, 4), ours="")
        for n in range(size)
    ]
    matrix = torch.ones(4, 4)
    to = folder / "exported"
    to.mkdir(exist_ok=True)
    for old in to.iterdir():
        old.unlink()
    write_shards(
        to,
        placed,
        dtypes={place.theirs: torch.bfloat16 for place in placed},
        max_shard_bytes=5 * 10**9,
        read=lambda place: matrix,
    )


CASES = (Case(name="export/tensors", unit="tensors", sizes=(6_000, 24_000, 96_000), run=_write),)
