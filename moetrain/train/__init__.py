"""Training: the composition root, one step, and the loop around it."""

from moetrain.train.control import Control, Outcome, Place
from moetrain.train.loop import TrainingError
from moetrain.train.prepare import (
    Prepared,
    as_plain,
    demand_same_model,
    newest_manifest,
    prepare,
)
from moetrain.train.rank import keep_freed_memory, leave_ranks, rank_device, run_rank
from moetrain.train.settings import RunSettings, TrainSettings

__all__ = [
    "Control",
    "Outcome",
    "Place",
    "Prepared",
    "RunSettings",
    "TrainSettings",
    "TrainingError",
    "as_plain",
    "demand_same_model",
    "keep_freed_memory",
    "leave_ranks",
    "newest_manifest",
    "prepare",
    "rank_device",
    "run_rank",
]
