"""Whether this machine's memory suffices to verify a model, and overrides with which it does."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_pipeline.quantities import binary_size, count
from moetrain.checks import ConfigError
from moetrain.model import total_parameters
from moetrain.settings import Config, ModelSettings, TrainSettings

GIB = 2**30
_CUT = (
    "num_layers", "dim", "ffn_hidden_dim", "dense_ffn_hidden_dim", "global_batch_size", "seq_len",
)  # fmt: skip
RANK_GIB = 0.4  # of a process with torch in it, before it holds a model


def require_memory(config: Config, *, num_ranks: int, available: float | None = None) -> None:
    """Raises ConfigError where the largest layout needs more memory than is available, in GiB."""
    available = available_gib() if available is None else available
    needed = needed_gib(config, num_ranks=num_ranks)
    if needed <= available:
        return
    raise ConfigError(
        "model.dim",
        config.model.dim,
        f"verifying {count(total_parameters(config.model))} parameters on "
        f"{config.train.global_batch_size} sequences of {config.train.seq_len} tokens needs about "
        f"{binary_size(needed * GIB)} of memory, and this machine has "
        f"{binary_size(available * GIB)} free: verify the same model in small, for example with "
        f"{_way_out(config, num_ranks=num_ranks, available=available)}",
    )


def needed_gib(config: Config, *, num_ranks: int) -> float:
    """Returns an upper estimate of what all ranks of the largest layout, and files, take.

    In float32: weights, gradients and Adam's moments; the copies of weights and moments that each
    rank gathers to compare them; or five in float64 in the reference; what FSDP gathers; and the
    activations of the whole batch, which are in memory at once where it isn't split into
    micro-batches.
    """
    model, train = config.model, config.train
    weights = 4 * total_parameters(model)
    copies = max(3 * num_ranks + 4, 10) + 2
    tokens = train.global_batch_size * train.seq_len
    copies_of_token = model.top_k + model.num_shared_experts
    inner = copies_of_token * (5 * model.ffn_hidden_dim + 4 * model.dim)
    inner = max(inner, 5 * (model.dense_ffn_hidden_dim or 0))
    outer = 14 * model.dim + 4 * model.num_heads * model.head_dim
    layer = 4 * tokens * (inner + outer)
    head = 4 * 3 * min(tokens, model.loss_chunk * num_ranks) * model.vocab_size
    return (copies * weights + model.num_layers * layer + head) / GIB + num_ranks * RANK_GIB


def reference_gib(config: Config) -> float:
    """Returns an upper estimate of what the float64 reference takes, on one sequence at a time.

    It has attention's whole matrix: scores, probabilities and the gradient of one of them.
    """
    model, seq_len = config.model, config.train.seq_len
    attention = 3 * model.num_heads * seq_len**2
    inner = model.top_k * 5 * model.ffn_hidden_dim + 5 * model.num_shared_experts * (
        model.ffn_hidden_dim
    )
    inner = max(inner, 5 * (model.dense_ffn_hidden_dim or 0))
    layer = attention + seq_len * (inner + 20 * model.dim)
    head = 4 * seq_len * model.vocab_size
    numbers = 5 * total_parameters(model) + model.num_layers * layer + head
    return 8 * numbers / GIB + RANK_GIB


def available_gib() -> float:
    """Returns the memory that processes may still take: the machine's, or the container's."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free / GIB


def _way_out(config: Config, *, num_ranks: int, available: float) -> str:
    """Returns overrides with which the model fits, the batch cut first."""
    for model, train in _smaller(config):
        small = replace(config, model=model, train=train)
        changed = [
            f"{group}.{name}={getattr(new, name)}"
            for group, new, old in (("model", model, config.model), ("train", train, config.train))
            for name in _CUT
            if hasattr(new, name) and getattr(new, name) != getattr(old, name)
        ]
        if needed_gib(small, num_ranks=num_ranks) <= available:
            return " ".join(changed)
    return "a smaller model.vocab_size and model.num_experts as well"


def _smaller(config: Config) -> Iterator[tuple[ModelSettings, TrainSettings]]:
    train = replace(
        config.train,
        global_batch_size=min(8, config.train.global_batch_size),
        seq_len=min(128, config.train.seq_len),
        micro_batch_size=None,
    )
    model = config.model
    yield model, train
    model = replace(model, num_layers=min(2, model.num_layers))
    while model.dim >= 32:
        yield model, train
        dense = model.dense_ffn_hidden_dim
        model = replace(
            model,
            dim=model.dim // 2,
            ffn_hidden_dim=max(16, model.ffn_hidden_dim // 2),
            dense_ffn_hidden_dim=dense and max(16, dense // 2),
        )
