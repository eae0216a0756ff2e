"""Training: the composition root, one step, and the loop around it."""

from moetrain.train.changes import Change, Kind, as_plain, changes, function_settings
from moetrain.train.control import Control, Outcome, Place
from moetrain.train.loop import TrainingError
from moetrain.train.prepare import Prepared, newest_manifest, prepare, rehearse
from moetrain.train.preview import Preview, preview_of, short
from moetrain.train.rank import keep_freed_memory, leave_ranks, rank_device, run_rank
from moetrain.train.resume import demand_done_alike, demand_same_model, training_on

__all__ = [
    "Change",
    "Control",
    "Kind",
    "Outcome",
    "Place",
    "Prepared",
    "Preview",
    "TrainingError",
    "as_plain",
    "changes",
    "demand_done_alike",
    "demand_same_model",
    "function_settings",
    "keep_freed_memory",
    "leave_ranks",
    "newest_manifest",
    "prepare",
    "preview_of",
    "rank_device",
    "rehearse",
    "run_rank",
    "short",
    "training_on",
]
