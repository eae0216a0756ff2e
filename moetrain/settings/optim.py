"""The settings of the optimizer and of its learning-rate schedule."""

from typing import Annotated

from annotated_types import Interval
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

Fraction = Annotated[float, Interval(ge=0.0, le=1.0)]
Decay = Annotated[float, Interval(ge=0.0, lt=1.0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class OptimSettings:
    """The optimizer. `momentum` is sgd's, `betas` and `eps` are adamw's."""

    name: Annotated[str, AfterValidator(one_of("adamw", "sgd"))] = "adamw"
    lr: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.1
    """On matrices only; norms are left alone."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    momentum: Decay = 0.0
    clip_grad_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; None never clips."""
    restart_from: PositiveInt | None = None
    """The step of a checkpoint from which the run goes on with a fresh optimizer state, as another
    optimizer needs. Later resumes keep the state since then."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ScheduleSettings:
    """The learning rate over the run, as a share of `optim.lr`.

    The last step has exactly `final_lr_ratio`, unless the rate is constant or still warming up.
    """

    name: Annotated[str, AfterValidator(one_of("cosine", "wsd", "constant"))] = "cosine"
    warmup_steps: NonNegativeInt = 100
    final_lr_ratio: Fraction = 0.1
    decay_fraction: Fraction = 0.2
    """wsd: the share of the run in which the rate falls (arXiv 2404.06395)."""
    restart_from: PositiveInt | None = None
    """The step of a checkpoint from which a new schedule begins: warm-up and fall are counted from
    there, up to `train.num_steps`."""
