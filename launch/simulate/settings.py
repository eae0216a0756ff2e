"""The settings of `moetrain simulate`: a cluster's failures, and what to print."""

from dataclasses import field
from typing import Annotated

from annotated_types import Ge, Interval, Len
from pydantic import (
    AfterValidator,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

from moetrain.checks import ConfigError, one_of


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class SimulateSettings:
    """Failures, and the cost of each of them and of each save.

    Only the rate of failures is a published one. How long detection, restart and saves take depends
    on the cluster, its storage and the model: the defaults are assumptions, to be replaced by what
    drills on that cluster measured.
    """

    nodes: Annotated[list[PositiveInt], Len(1)] = field(
        default_factory=lambda: [2**power for power in range(13)]
    )
    """Numbers of nodes, a row of the table each."""
    gpus_per_node: PositiveInt = 8
    """Only printed: failures are counted per node."""
    failures_per_1000_node_days: Annotated[float, Interval(ge=1e-6, le=1e9)] = 6.5
    """Failures that end an attempt. 6.5 is that of Meta's cluster RSC-1 (arXiv 2410.21680)."""
    detect_seconds: NonNegativeFloat = 15.0
    """From a failure to its detection. 15 is the target of launch/ for a lost node."""
    restart_seconds: NonNegativeFloat = 300.0
    """From detection to the first step: another node, processes, rendezvous, loading. 300 is
    assumed (arXiv 2410.21680 uses 5 to 20 minutes in its model)."""
    save_seconds: Annotated[float, Ge(0.001)] = 5.0
    """How long training waits for a save. Assumed."""
    durable_seconds: PositiveFloat = 60.0
    """From a save's beginning until it survives a failure; as long as `save_seconds` without
    `checkpoint.async_save`. Assumed."""
    hang_share: Annotated[float, Interval(ge=0.0, le=1.0)] = 0.0
    """The share of failures that are hangs, which take longer to detect."""
    hang_detect_seconds: NonNegativeFloat = 600.0
    """From the beginning of a hang to its detection: `launch.hang_timeout_seconds`."""
    interval_seconds: PositiveFloat | None = None
    """Training time between two saves; None: the best. Rounded up to whole steps if their time is
    given."""
    step_seconds: PositiveFloat | None = None
    """The time of a step, to print intervals in steps, as `checkpoint.every_steps` needs them."""
    target: Annotated[float, Interval(gt=0.0, lt=1.0)] = 0.9
    """Target of effective training time; the longest restart that still allows it is printed."""
    check: bool = False
    """Whether to simulate each row too, failure by failure; the exit code is 1 if one differs."""
    check_failures: Annotated[int, Interval(ge=100, le=1_000_000)] = 20_000
    """Failures to simulate for a row; fewer if thousands of saves are between two of them."""
    seed: NonNegativeInt = 0
    """Of the simulated failures."""
    format: Annotated[str, AfterValidator(one_of("table", "json"))] = "table"


def check(settings: SimulateSettings) -> None:
    """Raises ConfigError if settings contradict each other."""
    if settings.durable_seconds < settings.save_seconds:
        raise ConfigError(
            "durable_seconds",
            settings.durable_seconds,
            f"a save isn't safe before it is over: use at least save_seconds="
            f"{settings.save_seconds}",
        )
    interval, shortest = settings.interval_seconds, settings.durable_seconds - settings.save_seconds
    if interval is not None and interval < shortest:
        raise ConfigError(
            "interval_seconds",
            interval,
            "a save would wait for the one before, which takes durable_seconds="
            f"{settings.durable_seconds}: use at least {shortest:g}",
        )
    if interval is not None and settings.step_seconds and interval < settings.step_seconds:
        raise ConfigError(
            "interval_seconds",
            interval,
            f"is shorter than a step: use at least step_seconds={settings.step_seconds}",
        )
