"""The settings of how ranks share the work."""

from typing import Annotated

from annotated_types import Ge
from pydantic import AfterValidator, ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from moetrain.checks import one_of


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ExchangeSettings:
    """How tokens travel between the ranks that hold the experts."""

    send_once: bool = True
    """Whether a token goes once to a rank, however many of its experts live there."""
    num_rounds: PositiveInt = 1
    """Parts in which the tokens travel: one's experts compute while the next one travels."""
    max_load: Annotated[float, Ge(1)] = 2.0
    """Times its fair share that a rank takes at once. More comes in rounds whose activations are
    computed again in the backward pass: an early imbalance costs time, not the run."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ParallelSettings:
    """How the ranks share the work. None: chosen from the number of ranks."""

    expert_degree: Annotated[int, Ge(1)] | None = None
    """Ranks over which one copy of the experts is spread."""
    data_shard_degree: Annotated[int, Ge(1)] | None = None
    """Ranks over which one copy of the dense weights is sharded (FSDP)."""
    data_replicate_degree: PositiveInt = 1
    """Copies of the sharded model, each with its own part of the batch."""
    context_degree: PositiveInt = 1
    tensor_degree: PositiveInt = 1
    pipeline_degree: PositiveInt = 1
    recompute: Annotated[str, AfterValidator(one_of("none", "full"))] = "none"
    """`full`: keep only each block's input for the backward pass; routing is saved, not redone."""
    exchange: ExchangeSettings = ExchangeSettings()
