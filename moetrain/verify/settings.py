"""The settings of a verification."""

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from moetrain.checks import one_of


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class VerifySettings:
    """How much is compared, and the form of the report."""

    num_steps: PositiveInt = 3
    """Steps of SGD that every layout takes."""
    num_ranks: PositiveInt = 4
    """Ranks of the largest layout; all run on this machine's CPU."""
    lr: PositiveFloat = 0.1
    """SGD's rate: large, so that a wrong gradient moves the weights visibly."""
    format: Annotated[str, AfterValidator(one_of("table", "json"))] = "table"
    timeout_seconds: PositiveFloat = 900.0
    """How long a layout may take, or a rank wait for its peers, before it counts as hung."""
