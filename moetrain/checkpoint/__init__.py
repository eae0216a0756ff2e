"""Checkpoints: complete or not there, and provably what was saved."""

from moetrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    candidates,
    next_attempt,
    read_attempt,
    read_latest,
    read_manifest,
    replace_text,
    step_folders,
)
from moetrain.checkpoint.settings import CheckpointSettings
from moetrain.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointError",
    "CheckpointSettings",
    "CheckpointStore",
    "Manifest",
    "candidates",
    "next_attempt",
    "read_attempt",
    "read_latest",
    "read_manifest",
    "replace_text",
    "step_folders",
]
