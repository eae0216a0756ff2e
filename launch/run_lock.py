"""One command on a machine trains a run at a time: the lock in the run's folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.locks import LockHeldError, owned, owner_of
from launch.folders import named_folder
from moetrain.checks import ConfigError


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Makes a run's folder and keeps other commands on this machine off it, even past a kill.

    Raises ConfigError where another command holds it. On other machines the number of the attempt
    is the fence.
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
    """Raises ConfigError where another command on this machine trains a run."""
    if (owner := owner_of(run_dir / "lock")) is not None:
        raise _in_use(run_dir, owner=owner)


def _in_use(run_dir: Path, *, owner: str) -> ConfigError:
    """Returns what is said of a run that another process is training."""
    return ConfigError(
        "run.name",
        run_dir.name,
        f"process {owner} is training this run: stop it first, or use another run.name",
    )
