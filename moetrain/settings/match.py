"""The settings by which an arm of a comparison is made as large as another."""

from typing import Annotated

from annotated_types import Interval
from pydantic import AfterValidator, ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from data_pipeline.settings import PathText
from moetrain.checks import one_of

MEASURES = ("active_parameters", "total_parameters", "flops_per_token", "training_flops")
SOLVED = ("ffn_hidden_dim", "num_layers", "num_steps")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class MatchSettings:
    """What the arm is matched to. One setting of it is worked out before anything else sees it."""

    to: PathText | None = None
    """One of `arms`, a model of `conf/model`, or the folder or `config.yaml` of a run."""
    by: Annotated[str, AfterValidator(one_of(*MEASURES))] = "active_parameters"
    """What is to be equal. `training_flops` are those of all tokens of a run."""
    solve: Annotated[str, AfterValidator(one_of(*SOLVED))] = "ffn_hidden_dim"
    """What is worked out: `model.ffn_hidden_dim` (of every expert, shared ones included),
    `model.num_layers`, or, for `training_flops`, `train.num_steps`."""
    multiple_of: PositiveInt | None = None
    """What the result is a multiple of; None: 8 for `ffn_hidden_dim`, as kernels need in bfloat16,
    else 1."""
    tolerance: Annotated[float, Interval(gt=0.0, lt=1.0)] = 0.01
    """How far, as a share of the target, the nearest result may be from it."""
    outcome: str | None = None
    """How near it came. The command sets it, and prints it; a value that is given is ignored."""
