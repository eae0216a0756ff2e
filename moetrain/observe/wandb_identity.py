"""The W&B run of a run folder: a moved folder keeps its own, a copy gets another.

Owns the two small files in `<run_dir>/wandb` that record it. Imports no wandb.
"""

import os
import secrets
from pathlib import Path

from data_pipeline.atomic_files import write_file

RUN_ID = "run_id"
RUN_FOLDER = "run_folder"
"""The folder's path when it last used its id. Inodes and devices would not do: they differ between
the nodes of a cluster, and between two mounts of one file system."""


def wandb_run_id(run_dir: Path) -> tuple[str, str | None]:
    """Returns the id of a folder's W&B run, and a message for the user, if any.

    The folder is a copy if the folder at the recorded path still has the same id, and is another
    folder.
    """
    folder, here = run_dir / "wandb", os.path.abspath(run_dir)
    known, was = _read(folder / RUN_ID), _read(folder / RUN_FOLDER)
    told = None
    if known and was and was != here:
        other = Path(was) / "wandb"
        if _read(other / RUN_ID) == known and not _is_the_same(other, folder):
            known = ""
            told = f"this folder is a copy of {was}: it gets its own W&B run"
        else:
            told = (
                f"this folder was {was}, and goes on in its W&B run {known}; if that one is still "
                f"in use elsewhere, delete {folder / RUN_ID}: this one then gets its own"
            )
    if not known:
        known = secrets.token_hex(8)
        write_file(folder / RUN_ID, known + "\n")
    if was != here:
        write_file(folder / RUN_FOLDER, os.fsencode(here) + b"\n")
    return known, told


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _is_the_same(other: Path, folder: Path) -> bool:
    """Whether two paths lead to one folder, as with a link or a second mount."""
    probe = folder / f".same_{secrets.token_hex(8)}"  # a new name, so no cache can contain it
    probe.touch()
    try:
        return (other / probe.name).exists()
    finally:
        probe.unlink(missing_ok=True)
