"""The settings of parallelism: how ranks share the work."""

from typing import Annotated

from annotated_types import Ge
from pydantic import AfterValidator, ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from moetrain.checks import one_of

EVERY = ("micro_batch", "step")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ExchangeSettings:
    """How tokens are exchanged between the ranks that hold the experts."""

    send_once: bool = True
    """Whether a token is sent once per rank, however many of its experts are there."""
    num_rounds: PositiveInt = 1
    """Rounds of the exchange: experts compute one round while the next one is in flight."""
    max_load: Annotated[float, Ge(1)] = 2.0
    """The most that a rank takes at once, as a multiple of its fair share. With more, the exchange
    takes more rounds and recomputes their activations in the backward pass: an early imbalance
    costs time, and doesn't end the run."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ParallelSettings:
    """The degrees of the layout. None: chosen from the number of ranks."""

    expert_degree: Annotated[int, Ge(1)] | None = None
    """Ranks over which one copy of the experts is distributed."""
    data_shard_degree: Annotated[int, Ge(1)] | None = None
    """Ranks over which one copy of the dense weights is sharded (FSDP)."""
    data_replicate_degree: PositiveInt = 1
    """Copies of the sharded model, each with its own part of the batch."""
    context_degree: PositiveInt = 1
    tensor_degree: PositiveInt = 1
    pipeline_degree: PositiveInt = 1
    recompute: Annotated[str, AfterValidator(one_of("none", "full"))] = "none"
    """`full`: keep only each block's input for the backward pass, and the choice of experts."""
    gather_weights: Annotated[str, AfterValidator(one_of("auto", *EVERY))] = "auto"
    """How often the ranks that shard the weights gather them, where a step has several
    micro-batches: in every `micro_batch`, or once a `step`, which keeps them in memory. `auto`:
    once a step where memory is known to allow it (cluster.memory_gib_per_gpu)."""
    reduce_gradients: Annotated[str, AfterValidator(one_of("auto", *EVERY))] = "auto"
    """How often gradients are summed over ranks: in every `micro_batch`, or once a `step`, which
    keeps unsharded float32 gradients until the last one. `auto` as above. The sums are the same up
    to the order of their terms."""
    exchange: ExchangeSettings = ExchangeSettings()
