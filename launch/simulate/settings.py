"""The settings of `python -m launch.simulate`: what a cluster does to a run, and what to print."""

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
    """Failures, and what each of them and each save costs.

    Only the rate of failures is a published one. How long it takes to notice a failure, to start
    again and to save depends on the cluster, its storage and the model: the defaults are
    assumptions to be replaced by what drills on that cluster measured.
    """

    nodes: Annotated[list[PositiveInt], Len(1)] = field(
        default_factory=lambda: [2**power for power in range(13)]
    )
    """A row of the table for each."""
    gpus_per_node: PositiveInt = 8
    """Only printed: failures are counted by node."""
    failures_per_1000_node_days: Annotated[float, Interval(ge=1e-6, le=1e9)] = 6.5
    """Failures that end an attempt. 6.5 is that of Meta's cluster RSC-1 (arXiv 2410.21680)."""
    detect_seconds: NonNegativeFloat = 15.0
    """From a failure until it is noticed. 15: what launch/ is to need for a lost node."""
    restart_seconds: NonNegativeFloat = 300.0
    """From then until the first step begins: another node, processes, rendezvous, loading. 300
    is assumed (the model of arXiv 2410.21680 is used there with 5 to 20 minutes)."""
    save_seconds: Annotated[float, Ge(0.001)] = 5.0
    """What training waits for a save. Assumed."""
    durable_seconds: PositiveFloat = 60.0
    """From a save's beginning until a failure can't take it any more; as long as `save_seconds`
    without `checkpoint.async_save`. Assumed."""
    hang_share: Annotated[float, Interval(ge=0.0, le=1.0)] = 0.0
    """The part of the failures that are hangs, which take longer to be noticed."""
    hang_detect_seconds: NonNegativeFloat = 600.0
    """From the beginning of a hang until it is noticed: `launch.hang_timeout_seconds`."""
    interval_seconds: PositiveFloat | None = None
    """Time trained between two saves; None: the best. Rounded up to whole steps if their time
    is given."""
    step_seconds: PositiveFloat | None = None
    """The time of a step, to have the intervals in steps, as `checkpoint.every_steps` wants it."""
    target: Annotated[float, Interval(gt=0.0, lt=1.0)] = 0.9
    """Of effective training time; the longest restart that still allows it is printed."""
    check: bool = False
    """Whether each row is simulated too, failure by failure; 1 is the exit code if one differs."""
    check_failures: Annotated[int, Interval(ge=100, le=1_000_000)] = 20_000
    """Failures to simulate for a row; fewer where thousands of saves lie between two of them."""
    seed: NonNegativeInt = 0
    """Of the simulated failures."""
    format: Annotated[str, AfterValidator(one_of("table", "json"))] = "table"


def check(settings: SimulateSettings) -> None:
    """Raises ConfigError where settings contradict each other."""
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
