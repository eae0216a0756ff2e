"""The settings of logging: how often to log, what to show, whether to use W&B."""

from dataclasses import field
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    PositiveInt,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass

from moetrain.checks import one_of
from moetrain.registries import METRICS, SINKS
from moetrain.settings.options import checked_options_by_name, known_names


def _switch(value: object) -> object:
    # YAML reads `on`, `true` and `off` as booleans, and OmegaConf makes those "True" and "False".
    return {"true": "auto", "false": "off"}.get(str(value).lower(), value)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class WandbSettings:
    """Where W&B's record of a run goes; `offline` needs neither key nor network."""

    mode: Annotated[str, AfterValidator(one_of("auto", "offline", "online", "disabled"))] = "auto"
    """auto: by WANDB_MODE or WANDB_DISABLED in the environment, else offline."""
    project: str | None = None
    """None: WANDB_PROJECT in the environment, else moetrain."""
    entity: str | None = None
    group: str | None = None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ObserveSettings:
    """What a run reports while it trains."""

    log_every_steps: PositiveInt = 10
    progress: Annotated[
        str, BeforeValidator(_switch), AfterValidator(one_of("auto", "bar", "lines", "off"))
    ] = "auto"
    wandb: WandbSettings = field(default_factory=WandbSettings)
    update_sizes: bool = False
    """Whether records have `optim/update_ratio/…`. At recorded steps, a rank then holds a copy of
    its weights while the optimizer changes them."""
    metrics: list[str] = field(default_factory=list)
    """Metrics of extensions to add to the records (docs/extending.md)."""
    metric_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The settings of each, by its name."""
    sinks: list[str] = field(default_factory=list)
    """Sinks of extensions that records are written to, besides metrics.jsonl, W&B and display."""
    sink_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The settings of each, by its name."""

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, names: list[str]) -> list[str]:
        return known_names(METRICS, names)

    @field_validator("sinks")
    @classmethod
    def _sinks(cls, names: list[str]) -> list[str]:
        return known_names(SINKS, names)

    @field_validator("metric_options")
    @classmethod
    def _metric_options(
        cls, given: dict[str, dict[str, Any]], info: ValidationInfo
    ) -> dict[str, dict[str, Any]]:
        return checked_options_by_name(METRICS, info.data.get("metrics"), given)

    @field_validator("sink_options")
    @classmethod
    def _sink_options(
        cls, given: dict[str, dict[str, Any]], info: ValidationInfo
    ) -> dict[str, dict[str, Any]]:
        return checked_options_by_name(SINKS, info.data.get("sinks"), given)
