"""What a rank trains with, and what extensions are called with at a run's events."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from data_pipeline import GlobalBatches, Prefetcher, ShardFolder, ValidationBatches
from moetrain.checkpoint.remote.uploader import Uploader
from moetrain.checkpoint.store import CheckpointStore
from moetrain.model import Transformer
from moetrain.observe import Sink, Tally
from moetrain.parallel import Gradients, Meshes
from moetrain.settings import Resolved
from moetrain.train.control import Control, Outcome, RankPlace, collective_timeout
from moetrain.train.objective import Objective
from moetrain.train.state import TrainState
from moetrain.train.step_report import Metric, StepReport
from moetrain.train.stragglers import Stragglers


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """All that the loop works with; `state` alone changes."""

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
    """The ranks, and what of the work is this one's."""
    shards: ShardFolder
    batches: GlobalBatches
    prefetcher: Prefetcher
    """Reads this rank's part of the batches, ahead of the step."""
    held_out: dict[str, ValidationBatches]
    """The validation text of each source."""
    checkpoints: CheckpointStore
    uploader: Uploader | None
    """Brings checkpoints elsewhere; on one rank, if they are to go anywhere."""
    state: TrainState
    sinks: list[Sink]
    """Where metric records go; empty on every rank but one."""
    event: Callable[..., None]
    stragglers: Stragglers | None
    """Compares the ranks; None where there is but one."""
    tally: Tally
    """What this attempt's time goes to."""
    callbacks: "Mapping[str, Callback]"
    """What an extension does at the run's events, by name."""
    metrics: Mapping[str, Metric]
    """What records have besides their own, by name."""

    def close(self, exit_code: int) -> None:
        """Ends what must be ended, with the exit code of the run."""
        self.checkpoints.close(
            timeout_seconds=collective_timeout(self.config.launch.hang_timeout_seconds)
        )
        self.prefetcher.close()
        for sink in self.sinks:
            sink.close(exit_code)


class Callback:
    """What an extension does at a run's events. Each is called on every rank, in the same order.

    An exception ends the run as a failure. What a callback has to remember for a resume it gives
    as `state`, the same on every rank.
    """

    def __init__(self, options: Any = None) -> None:
        self.options = options
        """Its own settings: an object of the dataclass it is registered with."""

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
        """Returns what a checkpoint keeps of it, as JSON values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave, before `run_start`."""
