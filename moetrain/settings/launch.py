"""The settings of where ranks run, and of the machines they run on."""

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
    """Who starts the ranks, how many, and how many failures they may have."""

    mode: Annotated[str, AfterValidator(one_of("auto", "inline", "ray"))] = "auto"
    """`inline`: one rank in this process; `ray`: supervised actors; `auto`: whichever fits."""
    num_workers: PositiveInt | None = None
    """Ranks. None: one for each GPU, or without a GPU two on a machine of several cores."""
    address: str | None = None
    """A Ray cluster's address. None or `auto`: the cluster that this is a job of, else the one that
    this machine is a node of, else a Ray of the run's own, which `local` always is."""
    max_failures: NonNegativeInt = 3
    """Restarts after a failed rank, until the run makes progress again."""
    max_preemptions: NonNegativeInt = 100
    """Restarts after a node was taken away; counted apart from failures."""
    hang_timeout_seconds: PositiveFloat = 600.0
    """Time without a heartbeat after which a rank counts as hung and all are started anew, at
    most: in training it is learned from the run's own steps, and usually shorter."""
    lease_seconds: PositiveFloat = 60.0
    """Time without a word from the supervisor after which a rank ends itself."""
    elastic: bool = False
    """Whether the run continues in a smaller layout while nodes are missing."""
    wait_for_nodes_seconds: NonNegativeFloat = 0.0
    """Time to wait for a place for all ranks, at the start, and after a loss unless the run is
    elastic: then it continues at once in a smaller layout, and grows again."""
    allow_unauthenticated: bool = False
    """Use a cluster that isn't on this machine and takes commands from anybody."""
    pass_env: list[str] = field(default_factory=list)
    """Environment variables of this process that ranks get besides those that they need anyway."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ClusterSettings:
    """The machines: what the ranks should know of them."""

    name: str = "local"
    gpus_per_node: PositiveInt = 8
    peak_tflops_per_gpu: PositiveFloat | None = None
    """Dense peak in the training dtype, for the utilisation; None: it isn't reported."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables that every rank gets."""
    spot_warnings: Annotated[str, AfterValidator(one_of("none", "aws", "gcp"))] = "none"
    """Whose metadata service is asked whether a node will be taken away."""
