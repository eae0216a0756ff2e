"""The settings of where ranks run, and of the machines that they run on."""

from dataclasses import field
from typing import Annotated

from pydantic import (
    AfterValidator,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

from moetrain.checks import one_of


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class LaunchSettings:
    """How ranks are started, how many, and how many failures are tolerated."""

    mode: Annotated[str, AfterValidator(one_of("auto", "inline", "ray"))] = "auto"
    """`inline`: one rank in this process; `ray`: supervised actors; `auto`: whichever fits."""
    num_workers: PositiveInt | None = None
    """Ranks. None: one per GPU, or without a GPU two on a machine with several cores."""
    address: str | None = None
    """A Ray cluster's address. None or `auto`: the cluster that this process is a job of, else the
    one that this machine is a node of, else a new local one; `local`: always a new local one."""
    max_failures: NonNegativeInt = 3
    """Restarts after a failed rank; the count resets when the run makes progress."""
    max_preemptions: NonNegativeInt = 100
    """Restarts after a preemption; counted separately from failures."""
    hang_timeout_seconds: PositiveFloat = 600.0
    """The longest time without a heartbeat before a rank counts as hung and all are restarted. In
    training the timeout follows from the run's own steps, and is usually shorter."""
    lease_seconds: PositiveFloat = 60.0
    """Time without contact from the supervisor after which a rank ends itself."""
    elastic: bool = False
    """Whether the run continues in a smaller layout while nodes are missing."""
    wait_for_nodes_seconds: NonNegativeFloat = 0.0
    """Time to wait for resources for all ranks, at the start, and after the loss of a node unless
    the run is elastic: then it continues immediately in a smaller layout, and grows again."""
    allow_unauthenticated: bool = False
    """Whether to use a remote cluster that accepts commands without authentication."""
    pass_env: list[str] = field(default_factory=list)
    """Environment variables of this process to pass on to ranks, besides those they always get."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ClusterSettings:
    """What ranks should know about the machines."""

    name: str = "local"
    gpus_per_node: PositiveInt | None = None
    """The ranks of a machine, in which experts exchange tokens. None: the GPUs that the machine or
    the Ray cluster has; 8 where there are none yet."""
    peak_tflops_per_gpu: PositiveFloat | None = None
    """Peak dense FLOPS in the training dtype, for the utilisation; None: it isn't reported."""
    memory_gib_per_gpu: PositiveFloat | None = None
    """Memory of a GPU, from which `auto` settings that trade memory for speed follow; None: they
    take the least memory."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables that every rank gets."""
    spot_warnings: Annotated[str, AfterValidator(one_of("none", "aws", "gcp"))] = "none"
    """The cloud whose metadata service is polled for preemptions."""
