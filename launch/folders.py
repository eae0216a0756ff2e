"""Checks that folders are usable before anything starts: the run's, temporary files', Ray's."""

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from moetrain.checks import ConfigError

# The kernel's limit on a socket's path, and the longest that Ray makes below its folder.
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
_SOCKET = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
_MOST_PID = 4194304


def try_folder(folder: Path) -> None:
    """Raises OSError if a folder can't be made or written to; leaves none behind."""
    if folder.is_dir():
        with tempfile.TemporaryFile(dir=folder):
            os.listdir(folder)
        return
    with ExitStack() as made:
        for part in [p for p in (folder, *folder.parents) if not p.is_dir()][::-1]:
            try:
                part.mkdir()
            except FileExistsError:
                if not part.is_dir():  # otherwise another command has just started there
                    raise
            else:
                made.callback(_remove_empty, part)


def require_folder(run_dir: Path) -> None:
    """Raises ConfigError if a run folder can't be made or written to; leaves none behind.

    Building shards may take hours, in vain for such a run.
    """
    with named_folder(run_dir):
        try_folder(run_dir)


@contextmanager
def named_folder(run_dir: Path) -> Iterator[None]:
    """Names the setting of an unusable folder, and a way out."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError("run.name", run_dir.name, f"{reason}: use a shorter one") from error
        way_out = (
            "make room there, or use a folder of another disk: run.dir=/another/disk/runs"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "use a folder that you may write to, such as run.dir=~/runs"
        )
        raise ConfigError(
            "run.dir", run_dir.parent, f"the run's folder {run_dir.name} there: {reason}; {way_out}"
        ) from error


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # another command has started there
        folder.rmdir()


def settle_temporary_folder() -> None:
    """Makes this process and its children put temporary files into a usable folder.

    Python silently uses another folder if TMPDIR doesn't exist, and Ray fails. Raises ConfigError
    if there is no usable folder.
    """
    given = os.environ.get("TMPDIR")
    try:
        usable = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError(
            "TMPDIR",
            given,
            "no folder can be written to for temporary files (they are full, or not yours: "
            f"{error.strerror}): make room, or set TMPDIR to a folder of yours",
        ) from error
    if given and os.path.abspath(given) != usable:
        print(
            f"moetrain: TMPDIR={given} isn't a folder that can be written to: temporary files go "
            f"to {usable}; make it, or set TMPDIR to one that is there",
            file=sys.stderr,
        )
        os.environ["TMPDIR"] = usable


def require_ray_folder() -> None:
    """Raises ConfigError if a Ray that is started here couldn't use its folder of sockets."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "/tmp")  # Ray's own rule
    if len(os.fsencode(os.path.join(folder, _SOCKET.format(pid=os.getpid())))) > _SOCKET_BYTES:
        most = _SOCKET_BYTES - len("/" + _SOCKET.format(pid=_MOST_PID))
        raise ConfigError(
            name,
            folder,
            f"Ray puts sockets below this folder, and of {len(os.fsencode(folder))} bytes it is "
            f"too long for them (the system lets a socket's path have {_SOCKET_BYTES}): use one of "
            f"at most {most}, such as RAY_TMPDIR=/tmp",
        )
    try:
        try_folder(Path(folder))
    except OSError as error:
        raise ConfigError(
            name,
            folder,
            f"Ray can't have its folder there ({(error.strerror or str(error)).lower()}): use one "
            "that you may write to, such as RAY_TMPDIR=/tmp",
        ) from error
