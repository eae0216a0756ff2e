"""The objects that a rank trains with, and the callbacks of extensions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.optim import Optimizer

from data_pipeline import GlobalBatches, Prefetcher, ShardFolder, ValidationBatches
from moetrain.checkpoint.remote.uploader import Uploader
from moetrain.checkpoint.store import CheckpointStore
from moetrain.model import Transformer, training_flops_per_token
from moetrain.observe import Sink, Tally
from moetrain.parallel import Gradients, Meshes
from moetrain.settings import Resolved
from moetrain.train.control import Control, Outcome, RankPlace, collective_timeout
from moetrain.train.deadline import Deadline
from moetrain.train.objective import Objective
from moetrain.train.state import TrainState
from moetrain.train.step_report import Metric, StepReport
from moetrain.train.stragglers import Stragglers
from moetrain.train.weight_norms import WeightNorms


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Everything that the loop works with; only `state` changes."""

    config: Resolved
    place: RankPlace
    control: Control
    device: torch.device
    model: Transformer
    optimizer: Optimizer
    gradients: Gradients
    objective: Objective
    """What is minimised."""
    meshes: Meshes
    """The ranks, and this rank's share of the work."""
    shards: ShardFolder
    batches: GlobalBatches
    prefetcher: Prefetcher
    """Reads this rank's part of the batches, ahead of the step."""
    held_out: dict[str, ValidationBatches]
    """The validation text of each source."""
    weights: WeightNorms
    """Measures the weights for the records."""
    checkpoints: CheckpointStore
    uploader: Uploader | None
    """Uploads checkpoints; on one rank, if `upload_to` is set."""
    state: TrainState
    sinks: list[Sink]
    """Where metric records go; empty on all ranks but one."""
    event: Callable[..., None]
    stragglers: Stragglers | None
    """Compares the ranks; None where there is only one."""
    tally: Tally
    """What this attempt's time is spent on."""
    deadline: Deadline
    """Which step is the last."""
    callbacks: "Mapping[str, Callback]"
    """The callbacks of extensions, by name."""
    metrics: Mapping[str, Metric]
    """The metrics of extensions, by name."""

    @cached_property
    def flops_per_sequence(self) -> float:
        """The FLOPs of a sequence's forward and backward pass, all its positions counted."""
        length = self.config.train.seq_len
        return length * training_flops_per_token(self.config.model, seq_len=length)

    def close(self, exit_code: int) -> None:
        """Closes what must be closed, with the exit code of the run."""
        self.checkpoints.close(
            timeout_seconds=collective_timeout(self.config.launch.hang_timeout_seconds)
        )
        self.prefetcher.close()
        for sink in self.sinks:
            sink.close(exit_code)


class Callback:
    """What an extension does at a run's events, called on every rank in the same order.

    An exception ends the run as a failure. A callback returns from `state` what it needs for a
    resume, the same on every rank.
    """

    def __init__(self, options: Any = None) -> None:
        self.options = options
        """Its options: an object of the dataclass it is registered with."""

    def run_start(self, trainer: Trainer) -> None:
        """Called before the first step of the run, and of each resume."""

    def step_end(self, trainer: Trainer, report: StepReport) -> None:
        """Called after each optimizer step; `trainer.state.step` counts it."""

    def validation_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Called with the figures of a validation."""

    def checkpoint(self, trainer: Trainer) -> None:
        """Called when a checkpoint was taken of `trainer.state`; it may still be written."""

    def run_end(self, trainer: Trainer, outcome: Outcome) -> None:
        """Called once the last checkpoint is written, where the run ends without a failure."""

    def state(self) -> dict[str, Any]:
        """Returns its state for a checkpoint, as JSON values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned; called before `run_start`."""
