"""The settings of the optimizer and of its learning-rate schedule."""

from dataclasses import field
from typing import Annotated, Any

from annotated_types import Interval
from pydantic import (
    AfterValidator,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass

from moetrain.registries import OPTIMIZERS, SCHEDULES
from moetrain.settings.options import checked_options

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Fraction = Annotated[float, Interval(ge=0.0, le=1.0)]
Decay = Annotated[float, Interval(ge=0.0, lt=1.0)]


def _known_optimizer(name: str | None) -> str | None:
    return name if name is None else OPTIMIZERS.known(name)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GroupSettings:
    """How the parameters of one role are trained, where that differs from the others."""

    lr_factor: NonNegativeFloat = 1.0
    """A factor of the learning rate, at every step."""
    weight_decay_factor: NonNegativeFloat = 1.0
    """A factor of `optim.weight_decay`; vectors don't decay anyway."""
    frozen: bool = False
    """Whether they keep their values. They have no gradient, which the norm and its clipping are
    without, and no optimizer state."""
    optimizer: Annotated[str | None, AfterValidator(_known_optimizer)] = None
    """Their own optimizer, with `betas`, `eps` and `momentum` of `optim`; null: `optim.name`."""
    options: dict[str, Any] = field(default_factory=dict)
    """The settings of that optimizer, where it has any."""

    @field_validator("options")
    @classmethod
    def _options(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("optimizer")
        if name is None and given and "optimizer" in info.data:
            raise ValueError("are those of an optimizer: set this group's optimizer too")
        return checked_options(OPTIMIZERS, name, given)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GroupsSettings:
    """Parameter groups, by the role of the parameters in the model.

    A group that a model has no parameters of (a dense model has no router) means nothing there, so
    that one configuration can train several models.
    """

    embedding: GroupSettings = GroupSettings()
    """The token embedding; also the head, where it is tied."""
    attention: GroupSettings = GroupSettings()
    norm: GroupSettings = GroupSettings()
    """All norms, those of queries and keys included."""
    router: GroupSettings = GroupSettings()
    experts: GroupSettings = GroupSettings()
    """The routed experts."""
    shared_experts: GroupSettings = GroupSettings()
    dense: GroupSettings = GroupSettings()
    """Feed-forward layers without a router."""
    head: GroupSettings = GroupSettings()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimSettings:
    """The optimizer. `momentum` is for sgd, `betas` and `eps` are for adamw."""

    name: Annotated[str, AfterValidator(OPTIMIZERS.known)] = "adamw"
    lr: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.1
    """On matrices only, not on norms."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    momentum: Decay = 0.0
    clip_grad_norm: PositiveFloat | None = 1.0
    """The largest global gradient norm; None: no clipping."""
    restart_from: PositiveInt | None = None
    """The step of a checkpoint from which the run resumes with a new optimizer state, as another
    optimizer needs. Later resumes keep the state."""
    options: dict[str, Any] = field(default_factory=dict)
    """The settings of an optimizer of an extension (docs/extending.md)."""
    groups: GroupsSettings = GroupsSettings()
    """What differs for the embedding, attention, norms, router, experts, …"""

    @field_validator("options")
    @classmethod
    def _options(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return checked_options(OPTIMIZERS, info.data.get("name"), given)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleSettings:
    """The learning rate over the run, as a share of `optim.lr`.

    The last step has exactly `final_lr_ratio`, unless the rate is constant or still warming up.
    """

    name: Annotated[str, AfterValidator(SCHEDULES.known)] = "cosine"
    warmup_steps: NonNegativeInt = 100
    """The length of the linear warm-up. `warmup_tokens` or `warmup_fraction` takes its place; of
    several on the command line and in files, the one on the command line is in force."""
    warmup_tokens: PositiveFloat | None = None
    """The warm-up in token positions, rounded up to whole steps."""
    warmup_fraction: Fraction | None = None
    """The warm-up as a share of the run's steps, of those from `restart_from` on."""
    final_lr_ratio: Fraction = 0.1
    decay_fraction: Fraction = 0.2
    """wsd: the share of the run in which the rate decays (arXiv 2404.06395)."""
    restart_from: PositiveInt | None = None
    """The step of a checkpoint from which a new schedule begins: warm-up and decay are counted from
    there, up to `train.num_steps`."""
    options: dict[str, Any] = field(default_factory=dict)
    """The settings of a schedule of an extension (docs/extending.md)."""

    @field_validator("options")
    @classmethod
    def _options(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return checked_options(SCHEDULES, info.data.get("name"), given)
