"""What a run will train, printed before it starts: counts from the settings alone, at any size."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from data_pipeline.quantities import binary_size, count
from moetrain.model import active_parameters, total_parameters, training_flops_per_token
from moetrain.settings import GroupsSettings, Resolved
from moetrain.train.memory import PROCESS_GIB, RankMemory, expected_memory
from moetrain.train.parameter_groups import parameter_groups

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a resolved configuration trains, and its cost."""

    parameters: int
    active_parameters: int
    """Active parameters: those of one token."""
    flops_per_token: float
    """Of a token's forward and backward pass."""
    tokens: int
    """Token positions in all steps, padding included, which `train/tokens` doesn't count."""
    batch: str
    asked: str | None
    """The setting that the number of steps was worked out from, if it wasn't given."""
    max_seconds: float | None
    """The time after which it ends before its steps are done."""
    layout: str
    match: str | None
    """How near its arm comes to what it is matched to."""
    memory: RankMemory
    on_cpu: bool
    groups: tuple[str, ...] = ()
    """How each role's parameters are trained, where they aren't all trained alike."""

    def lines(self) -> Iterator[str]:
        """Yields the lines to print."""
        yield (
            f"model: {count(self.parameters)} parameters, {count(self.active_parameters)} active "
            f"for a token; {count(self.flops_per_token, billion='G')}FLOPs a token"
        )
        asked = f", for {self.asked}" if self.asked else ""
        asked += f", at most train.max_seconds={self.max_seconds:g}" if self.max_seconds else ""
        if self.match is not None:
            yield f"match: {self.match}"
        yield f"training: {self.batch} = {count(self.tokens)} tokens{asked}; {self.layout}"
        parts = ", ".join(f"{k} {binary_size(size)}" for k, size in asdict(self.memory).items())
        process = f" and {PROCESS_GIB} GiB for its process" if self.on_cpu else ""
        yield from (f"parameters of {group}" for group in self.groups)
        yield f"memory: up to {binary_size(self.memory.total)} a rank{process} ({parts})"

    def counts(self) -> dict[str, Any]:
        """Returns the figures for a run's record."""
        return {
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "flops_per_token": self.flops_per_token,
            "tokens": self.tokens,
            "memory_gib": {n: round(size / GIB, 4) for n, size in asdict(self.memory).items()},
        }


def preview_of(config: Resolved) -> Preview:
    """Returns what a resolved configuration trains."""
    train, parallel = config.train, config.parallel
    shards, replicas = parallel.data_shard_degree, parallel.data_replicate_degree
    ranks, micro = shards * replicas, train.micro_batch_size
    num_micro = train.global_batch_size // (ranks * micro)
    degrees = f"expert {parallel.expert_degree}, shard {shards}, replicate {replicas}"
    once = [
        what
        for what, every in (
            ("weights gathered", parallel.gather_weights),
            ("gradients reduced", parallel.reduce_gradients),
        )
        if every == "step"
    ]
    on_cpu = _on_cpu(config)
    return Preview(
        parameters=total_parameters(config.model),
        active_parameters=active_parameters(config.model),
        flops_per_token=training_flops_per_token(config.model, seq_len=train.seq_len),
        tokens=train.num_steps * train.global_batch_size * train.seq_len,
        batch=f"{train.num_steps:,} steps of {train.global_batch_size} x {train.seq_len:,}",
        asked=_asked(config),
        max_seconds=train.max_seconds,
        layout=(
            f"{_many(ranks, 'rank')} ({degrees}), {_many(num_micro, 'micro-batch')} of "
            f"{_many(micro, 'sequence')} a step"
            f"{', ' + ' and '.join(once) + ' once a step' if once else ''}"
        ),
        match=config.match.outcome,
        memory=expected_memory(config, on_cpu=on_cpu),
        on_cpu=on_cpu,
        groups=_groups(config),
    )


def _groups(config: Resolved) -> tuple[str, ...]:
    if config.optim.groups == GroupsSettings():
        return ()
    return tuple(map(str, parameter_groups(config.model, config.optim)))


def _asked(config: Resolved) -> str | None:
    """Returns the setting that the number of steps was worked out from; None: it was given."""
    for name in ("num_tokens", "flops"):
        if (value := getattr(config.train, name)) is not None:
            return f"train.{name}={value:g}"
    return None


def _many(number: int, what: str) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def _on_cpu(config: Resolved) -> bool:
    """Returns whether ranks compute on CPUs, as far as this machine can tell for a cluster."""
    if config.run.device != "auto":
        return config.run.device == "cpu"
    return config.cluster.peak_tflops_per_gpu is None and not torch.cuda.is_available()
