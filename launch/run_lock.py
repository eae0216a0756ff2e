"""The lock in a run folder: one command on a machine trains a run at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.locks import LockHeldError, owned, owner_of
from launch.folders import named_folder
from moetrain.checks import ConfigError


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Makes a run folder and locks it against other commands on this machine; a kill releases the
    lock.

    Raises ConfigError if another command holds it. On other machines the attempt number is the
    fence.
    """
    with ExitStack() as stack:
        with named_folder(run_dir):
            (run_dir / "logs").mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(owned(run_dir / "lock"))
            except LockHeldError as error:
                raise _in_use(run_dir, owner=error.owner) from None
        yield


def require_free(run_dir: Path) -> None:
    """Raises ConfigError if another command on this machine trains a run."""
    if (owner := owner_of(run_dir / "lock")) is not None:
        raise _in_use(run_dir, owner=owner)


def _in_use(run_dir: Path, *, owner: str) -> ConfigError:
    """Returns the error for a run that another process is training."""
    return ConfigError(
        "run.name",
        run_dir.name,
        f"process {owner} is training this run: stop it first, or use another run.name",
    )
