"""The settings of observation: how often to log, what to show, whether to tell W&B."""

from dataclasses import field
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from moetrain.checks import one_of


def _switch(value: object) -> object:
    # YAML reads `on`, `true` and `off` as booleans, and OmegaConf makes those "True" and "False".
    return {"true": "auto", "false": "off"}.get(str(value).lower(), value)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class WandbSettings:
    """Where W&B's record of a run goes; `offline` needs neither key nor network."""

    mode: Annotated[str, AfterValidator(one_of("auto", "offline", "online", "disabled"))] = "auto"
    """auto: what WANDB_MODE or WANDB_DISABLED in the environment says, else offline."""
    project: str | None = None
    """None: WANDB_PROJECT of the environment, else moetrain."""
    entity: str | None = None
    group: str | None = None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ObserveSettings:
    """What a run tells about itself while it trains."""

    log_every_steps: PositiveInt = 10
    progress: Annotated[
        str, BeforeValidator(_switch), AfterValidator(one_of("auto", "bar", "lines", "off"))
    ] = "auto"
    wandb: WandbSettings = field(default_factory=WandbSettings)
