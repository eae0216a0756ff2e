"""The settings of checkpointing."""

from dataclasses import field
from typing import Annotated

from annotated_types import Ge
from pydantic import AfterValidator, ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from data_pipeline.settings import PathText
from moetrain.checks import one_of


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class CheckpointSettings:
    """When checkpoints are written, and which are kept."""

    every_steps: PositiveInt = 500
    keep_last: Annotated[int, Ge(2)] = 3
    """Newest complete checkpoints to keep; at least two, in case the newest one is corrupted."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that this divides are never deleted; a multiple of `every_steps`."""
    resume: Annotated[str, AfterValidator(one_of("auto", "never"))] = "auto"
    """`auto` resumes from the newest good checkpoint; `never` refuses a run that has one."""
    accept_changes: list[str] = field(default_factory=list)
    """Settings of the model that may differ from the checkpoint's, although its weights then
    compute something else."""
    async_save: bool = True
    """Whether training continues while a checkpoint is being written. It takes host memory for a
    copy of a rank's part of the model and the optimizer state."""
    upload_to: PathText | None = None
    """The address of a folder, such as s3://bucket/runs, to which each checkpoint is uploaded."""
