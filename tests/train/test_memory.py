"""The memory that is expected of a rank, against torch's own count of what a CPU run holds."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest

from moetrain.model import head_activations
from moetrain.settings import Resolved
from moetrain.train.memory import expected_memory
from moetrain.train.preview import preview_of
from tests.support.ranks import run_ranks
from tests.support.runs import tiny_config

MIB = 2**20

# Large enough for activations, weights and logits each to show; two micro-batches of 1,024 tokens.
SIZES = {
    "model__dim": 128, "model__num_layers": 3, "model__num_heads": 4, "model__num_kv_heads": 2,
    "model__head_dim": 32, "model__ffn_hidden_dim": 256, "model__num_experts": 4,
    "model__vocab_size": 1024, "model__max_seq_len": 128, "train__seq_len": 128,
    "train__micro_batch_size": 8, "model__router__force_balance": True,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "experts": {},
    "recomputed": {"parallel__recompute": "full"},
    "experts recomputed": {"model__experts__recompute": True},
    "dense": {"model__num_experts": 1, "model__top_k": 1},
    "all kinds of layers": {
        "model__num_shared_experts": 1, "model__qk_norm": True, "model__num_dense_layers": 1,
        "model__dense_ffn_hidden_dim": 700, "optim__name": "sgd", "optim__momentum": 0.9,
    },
}  # fmt: skip


def measured(configs: dict[str, Resolved], folder: str) -> dict[str, int]:
    """Returns the bytes of tensors that a rank holds at most in a step of each run."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from moetrain.optim import allocate_state
    from moetrain.train.build import build_model
    from moetrain.train.micro_batch import MicroBatch
    from moetrain.train.step import train_step

    def train(config: Resolved) -> None:
        model, optimizer, gradients, meshes = build_model(
            config,
            device=torch.device("cpu"),
            timeout_seconds=60,
        )
        tokens = torch.randint(0, config.model.vocab_size, (8, config.train.seq_len))
        valid = torch.ones_like(tokens, dtype=torch.bool)
        batches = [MicroBatch(tokens=tokens, targets=tokens, valid=valid) for _ in range(2)]
        allocate_state(optimizer)  # which the first step ends with
        train_step(
            batches,
            model=model,
            optimizer=optimizer,
            gradients=gradients,
            meshes=meshes,
            learning_rate=0.01,
        )

    peaks = {}
    for name, config in configs.items():
        gc.collect()  # the run before this one
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            train(config)
        path = f"{folder}/{torch.distributed.get_rank()}.json"
        profiled.export_chrome_trace(path)
        events = json.loads(Path(path).read_text())["traceEvents"]
        os.unlink(path)
        held = [e["args"] for e in events if e.get("name") == "[memory]"]
        before = held[0]["Total Allocated"] - held[0]["Bytes"]
        peaks[name] = max(e["Total Allocated"] for e in held) - before
    return peaks


def configured(folder: Path, *, num_workers: int, **changes: Any) -> Resolved:
    batch = {"train__global_batch_size": 16 * num_workers}
    return tiny_config(folder, shards=folder, num_workers=num_workers, **SIZES | batch | changes)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_rank_holds_no_more_than_expected_and_all_that_is_whole(
    tmp_path: Path, num_workers: int
) -> None:
    cases = CASES if num_workers == 1 else {"experts": {}}
    configs = {
        name: configured(tmp_path, num_workers=num_workers, **changes)
        for name, changes in cases.items()
    }
    for rank in run_ranks(measured, num_workers, configs, str(tmp_path)):
        for name, peak in rank.items():
            expected = expected_memory(configs[name], on_cpu=True)
            assert peak / MIB <= 1.03 * expected.total / MIB, name
            # What is whole when the last forward pass ends; the head's part and the weights that
            # FSDP gathers come and go.
            whole = expected.total - expected.gathered - of_head(configs[name])
            assert whole / MIB <= peak / MIB, name


def of_head(config: Resolved) -> float:
    tokens = 8 * config.train.seq_len
    return head_activations(config.model, tokens=tokens, width=4, norm=3)


@pytest.mark.parametrize(
    ("gib", "told"),
    [
        (None, "a step"),
        (1e-4, "a step"),
        (64.0, "a step, weights gathered and gradients reduced once a step"),
    ],
)
def test_what_happens_once_a_step_follows_from_the_memory_and_is_told(
    gib: float | None, told: str, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path, shards="shards", num_workers=2, train__micro_batch_size=1,
        cluster__memory_gib_per_gpu=gib,
    )  # fmt: skip
    assert preview_of(config).layout.endswith(f"of 1 sequence {told}")
    alone = tiny_config(tmp_path, shards="shards", cluster__memory_gib_per_gpu=gib)
    assert alone.parallel.gather_weights == "micro_batch", "one micro-batch"
