"""The expected peak memory of a rank, from the settings alone.

An upper estimate of live tensors. It covers the float32 shards of weights, gradients and optimizer
state; the weights that FSDP gathers, of the embedding, the head and two layers, with one layer's
gradients, or of the whole model where they are kept for a step; the activations of a micro-batch;
and the chunk of logits. It adds them up as if all were at their peak at once, as gradients and
activations are with several micro-batches. It doesn't cover an expert load above the mean, the
exchange's messages in flight, memory held by the allocator (`memory/peak_gib` of a CPU run counts
that), and on a CPU the process itself.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from moetrain.model import (
    embedding_parameters,
    head_activations,
    kept_activations,
    total_parameters,
)
from moetrain.model.roles import Role, roles_of
from moetrain.optim import moved_by, state_size
from moetrain.settings import Resolved
from moetrain.train.parameter_groups import parameter_groups

PROCESS_GIB = 0.5
"""Resident memory of a rank's process before it holds a model, with torch on a CPU."""
MOST_OF_MEMORY = 0.8
"""The rest is for an expert load above the mean, messages in flight and fragmentation."""
MASTER = 4  # bytes per float32 number, as weights, gradients and moments are kept


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes by what they hold."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    """Weights of whole layers that FSDP has gathered, and their unreduced gradients."""
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(asdict(self).values()))


def fitting_communication(config: Resolved, *, undecided: Sequence[str]) -> dict[str, str]:
    """Returns how often weights are gathered and gradients reduced, for the `undecided` of the two.

    Once a step where there are several micro-batches and that fits into most of a GPU's memory,
    one after the other in the order given.
    """
    parts = config.parallel.data_shard_degree * config.parallel.data_replicate_degree
    several = config.train.global_batch_size > parts * config.train.micro_batch_size
    room = MOST_OF_MEMORY * (config.cluster.memory_gib_per_gpu or 0.0) * 2**30
    choice = dict.fromkeys(undecided, "micro_batch")
    for name in undecided:
        larger = choice | {name: "step"}
        asked = replace(config, parallel=replace(config.parallel, **larger))  # type: ignore[arg-type]  # two strings
        if several and expected_memory(asked, on_cpu=False).total <= room:
            choice = larger
    return choice


def expected_memory(config: Resolved, *, on_cpu: bool) -> RankMemory:
    """Returns the expected peak memory of a rank of a resolved configuration."""
    model, train, parallel = config.model, config.train, config.parallel
    shards, experts = parallel.data_shard_degree, parallel.expert_degree
    tokens = train.micro_batch_size * train.seq_len
    width = 4 if train.dtype == "float32" or (train.dtype == "auto" and on_cpu) else 2
    local = MASTER * total_parameters(model) / shards
    kept = kept_activations(
        model,
        tokens=tokens,
        width=width,
        composed_norm=on_cpu,
        sent_rows=min(model.top_k, experts) if experts > 1 else 0,
    )
    if parallel.recompute == "full":
        kept = [max(kept), *(float(tokens * model.dim * width) for _ in kept)]
    trained, states = (
        float(total_parameters(model)),
        total_parameters(model) * state_size(config.optim),
    )
    if {moved_by(config.optim, role) for role in roles_of(model)} != {config.optim.name}:
        groups = parameter_groups(model, config.optim)
        trained = float(sum(group.parameters for group in groups if group.optimizer))
        states = sum(g.parameters * state_size(config.optim, Role(g.role)) for g in groups)
    root = embedding_parameters(model)
    layer = (total_parameters(model) - root) / model.num_layers
    if model.is_moe:
        of_experts = 3 * model.num_experts * model.ffn_hidden_dim * model.dim
        layer -= of_experts * (1 - 1 / experts)
    whole = root + layer * model.num_layers
    # The layer that computes and the next one, and the gradients of the first.
    gathered = width * root + layer * (3 * width + MASTER)
    if parallel.gather_weights == "step":
        gathered += width * (whole - root)
    if parallel.reduce_gradients == "step":
        gathered += MASTER * whole
    return RankMemory(
        weights=local,
        gradients=MASTER * trained / shards,
        optimizer=MASTER * states / shards,
        gathered=gathered,
        activations=sum(kept)
        + head_activations(model, tokens=tokens, width=width, norm=3 if on_cpu else 2),
    )
