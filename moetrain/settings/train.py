"""The settings of the training loop."""

from dataclasses import field
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass

from data_pipeline.settings import PathText
from moetrain.checks import one_of
from moetrain.registries import CALLBACKS, OBJECTIVES
from moetrain.settings.options import checked_options, checked_options_by_name, known_names


def _one_folder(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError("must be the name of one folder, with no slash in it")
    return name


FolderName = Annotated[str, AfterValidator(_one_folder)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TrainSettings:
    """The length of the run, batch sizes in sequences, and the dtype."""

    num_steps: PositiveInt | None = None
    """The length of the run in optimizer steps. One of this, `num_tokens` and `flops` is needed;
    of several the one on the command line is in force, and in files another unit than steps."""
    num_tokens: PositiveFloat | None = None
    """The length in token positions (`1e9`), padding included, rounded up to whole steps."""
    flops: PositiveFloat | None = None
    """The length in FLOPs of forward and backward passes, of all positions, rounded up to whole
    steps; attention and head count, recomputation doesn't."""
    max_seconds: PositiveFloat | None = None
    """The time of the run's attempts in steps, validations and checkpoints, after which the next
    step is the last one, if it isn't anyway: validated and saved like any last step. The learning
    rate goes by the steps, so that it may not have decayed by then; and the number of steps, so the
    result, depends on the machine's speed."""
    global_batch_size: PositiveInt
    seq_len: PositiveInt
    micro_batch_size: PositiveInt | None = None
    """Sequences per rank and micro-batch; None: up to 16,384 tokens of them."""
    dtype: Annotated[str, AfterValidator(one_of("auto", "float32", "bfloat16"))] = "auto"
    """The dtype in which weights are gathered and multiplied; auto: bfloat16 on CUDA, float32 on
    CPU."""
    deterministic: bool = False
    """Whether a run gives the same bits each time on GPUs too, which takes slower kernels. On CPUs
    it does anyway."""
    validate_every_steps: NonNegativeInt = 0
    """0: at the beginning and at the end only."""
    validate_at_start: bool = True
    """Whether the weights that a run begins with are validated: a record of step 0."""
    validation_sequences: PositiveInt | None = 1024
    """The most held-out sequences per source to validate on, evenly spread over all that it has and
    the same for a seed; None: all."""
    validation_weights: Annotated[str, AfterValidator(one_of("mixture", "tokens"))] = "mixture"
    """The weight of a source in `validation/loss`: its share of the samples trained on at that
    step, or its held-out tokens that are read."""
    max_skipped_steps: PositiveInt = 10
    """Consecutive skipped steps after which the run stops."""
    objective: Annotated[str, AfterValidator(OBJECTIVES.known)] = "pretraining"
    """What a step minimises."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    callbacks: list[str] = field(default_factory=list)
    """Called at the run's start, after steps, validations and checkpoints, and at the end."""
    callback_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The options of each, by its name."""

    @field_validator("objective_options")
    @classmethod
    def _objective_options(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return checked_options(OBJECTIVES, info.data.get("objective"), given)

    @field_validator("callbacks")
    @classmethod
    def _callbacks(cls, names: list[str]) -> list[str]:
        return known_names(CALLBACKS, names)

    @field_validator("callback_options")
    @classmethod
    def _callback_options(
        cls, given: dict[str, dict[str, Any]], info: ValidationInfo
    ) -> dict[str, dict[str, Any]]:
        return checked_options_by_name(CALLBACKS, info.data.get("callbacks"), given)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class RunSettings:
    """The run's name, where it is kept and what it runs on."""

    name: FolderName | None = None
    """An existing run of this name resumes from its newest checkpoint; None: a new name."""
    dir: PathText = "runs"
    """The folder that holds the runs."""
    device: Annotated[str, AfterValidator(one_of("auto", "cpu", "cuda"))] = "auto"
    extensions: dict[str, str] = field(default_factory=dict)
    """Version and SHA-256 of the source of each extension. The command sets it in a run's
    configuration; values that are given are ignored."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of a rank. None: its machine's cores divided by the run's ranks there, and one in
    trials of a sweep that run at the same time."""
