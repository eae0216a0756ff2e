"""Copies of checkpoints elsewhere: an object store, or another disk."""

from moetrain.checkpoint.remote.folder import (
    RemoteUnavailableError,
    check_url,
    demand_mounted,
)
from moetrain.checkpoint.remote.of_run import (
    fetch_newer,
    good_save,
    is_newer_there,
    newest_manifest_there,
    start_uploads,
    take_over,
    upload_missing,
)
from moetrain.checkpoint.remote.uploader import Uploader

__all__ = [
    "RemoteUnavailableError",
    "Uploader",
    "check_url",
    "demand_mounted",
    "fetch_newer",
    "good_save",
    "is_newer_there",
    "newest_manifest_there",
    "start_uploads",
    "take_over",
    "upload_missing",
]
