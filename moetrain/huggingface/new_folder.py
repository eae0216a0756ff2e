"""A folder that is created atomically with everything in it, and its command's exit code.

Exports, imports, branches and upcycled runs are such folders.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline import DataError
from data_pipeline.atomic_files import name_folder, sync_tree
from data_pipeline.quantities import decimal_size
from moetrain.checkpoint.manifest import CheckpointError
from moetrain.checks import ConfigError
from moetrain.exit_codes import BAD_CONFIGURATION, DONE, FAILED
from moetrain.huggingface.names import ConversionError
from moetrain.redaction import redacted_text


def exit_code(work: Callable[[], None], *, command: str) -> int:
    """Does a command's work; returns its exit code, after one message where it can't be done."""
    try:
        work()
    except (ConfigError, DataError, ConversionError) as error:
        code, message = BAD_CONFIGURATION, str(error)
    except (CheckpointError, OSError) as error:
        code, message = FAILED, str(error)
    else:
        return DONE
    print(f"{command}: {redacted_text(message)}", file=sys.stderr)
    return code


def require_new(to: Path, *, num_bytes: int) -> None:
    """Raises ConfigError where `to` is taken, or has no room for so many bytes."""
    if to.is_symlink() or (to.exists() and not (to.is_dir() and not any(to.iterdir()))):
        raise ConfigError("to", to, "is there already: use a folder that is new or empty")
    above = next(p for p in to.absolute().parents if p.exists())
    if not above.is_dir():
        raise ConfigError("to", to, f"{above} is no folder: use a folder that can be made")
    if (free := shutil.disk_usage(above).free) < num_bytes:
        raise ConfigError(
            "to",
            to,
            f"{decimal_size(num_bytes)} are to be written, and {decimal_size(free)} are free "
            "there: use another disk",
        )


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """Yields a folder beside `to` that takes its name once everything in it is on disk.

    After an error it is deleted, and `to` is as it was.
    """
    to = to.absolute()
    staged = to.with_name(f".{to.name}.unfinished-{os.getpid()}")
    staged.mkdir(parents=True)
    try:
        yield staged
        sync_tree(staged)
        name_folder(staged, to)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
