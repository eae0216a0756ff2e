"""Checkpoints: complete or not there, and provably what was saved."""

from moetrain.checkpoint.chosen import chosen_checkpoint
from moetrain.checkpoint.folders import (
    Save,
    candidates,
    commit,
    demand_newest,
    newest_good,
    next_attempt,
    read_attempt,
    read_latest,
    replace_text,
    staged_folder,
    with_way_out,
)
from moetrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    StorageError,
    TensorEntry,
    is_passing,
    read_manifest,
    step_of,
    verify_all,
    verify_files,
)
from moetrain.checkpoint.offline import write_checkpoint
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.tensor_files import CheckpointReader, TensorFileWriter, cut_into_files

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "CheckpointStore",
    "Manifest",
    "Save",
    "StorageError",
    "TensorEntry",
    "TensorFileWriter",
    "candidates",
    "chosen_checkpoint",
    "commit",
    "cut_into_files",
    "demand_newest",
    "is_passing",
    "newest_good",
    "next_attempt",
    "read_attempt",
    "read_latest",
    "read_manifest",
    "replace_text",
    "staged_folder",
    "step_of",
    "verify_all",
    "verify_files",
    "with_way_out",
    "write_checkpoint",
]
