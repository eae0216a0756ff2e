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
    """Complete checkpoints that stay; two at least, so that a bad newest one has a fall-back."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that this divides stay for good; a multiple of `every_steps`."""
    resume: Annotated[str, AfterValidator(one_of("auto", "never"))] = "auto"
    """`auto` resumes from the newest good checkpoint; `never` refuses a run that has one."""
    accept_changes: list[str] = field(default_factory=list)
    """Settings of the model that may have another value than the checkpoint was trained with,
    though its weights then compute something else."""
    async_save: bool = True
    """Whether training continues while a checkpoint is being written. It takes host memory for a
    copy of what a rank has of the model and its optimizer."""
    upload_to: PathText | None = None
    """The address of a folder, such as s3://bucket/runs, that gets a copy of each checkpoint."""
