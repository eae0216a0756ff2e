"""The settings of the training loop."""

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from data_pipeline.settings import PathText
from moetrain.checks import one_of


def _one_folder(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError("must be the name of one folder, with no slash in it")
    return name


FolderName = Annotated[str, AfterValidator(_one_folder)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TrainSettings:
    """How long, on how much at once, and in which dtype. Batch sizes count sequences."""

    num_steps: PositiveInt
    global_batch_size: PositiveInt
    seq_len: PositiveInt
    micro_batch_size: PositiveInt | None = None
    """Sequences that a rank takes through the model at once; None: up to 16,384 tokens of them."""
    dtype: Annotated[str, AfterValidator(one_of("auto", "float32", "bfloat16"))] = "auto"
    """What weights are gathered and multiplied as; auto: bfloat16 on CUDA, float32 on CPU."""
    validate_every_steps: NonNegativeInt = 0
    """0: at the end only."""
    validation_sequences: PositiveInt | None = 1024
    """Held-out sequences of each source to validate on at most, evenly spread over all that it has,
    the same ones for a seed; None: all."""
    validation_weights: Annotated[str, AfterValidator(one_of("mixture", "tokens"))] = "mixture"
    """What a source counts for in `validation/loss`: its share of the samples trained on at that
    step, or its held-out tokens that are read."""
    max_skipped_steps: PositiveInt = 10
    """Non-finite steps in a row after which the run stops."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class RunSettings:
    """What the run is called, where it is kept and what it runs on."""

    name: FolderName | None = None
    """A run that has the name already goes on from its newest checkpoint; None: a new name."""
    dir: PathText = "runs"
    """The folder that holds the runs."""
    device: Annotated[str, AfterValidator(one_of("auto", "cpu", "cuda"))] = "auto"
    threads_per_rank: PositiveInt | None = None
    """Threads that a rank computes with on a CPU. None: its machine's cores over the run's ranks
    there, and one in the trials of a sweep that run side by side."""
