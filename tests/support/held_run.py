"""Runs that are held at a step, so that what a test does to them races with nothing."""

from pathlib import Path

from tests.drills.faults import VARIABLE, Fault, arm, disarm, variables

ROOT = Path(__file__).parents[2]
PASS_HOLD = f"launch.pass_env=[{VARIABLE}]"
"""The override with which ranks under Ray get the environment."""


class Hold:
    """Holds the first rank of every run that has its environment, before a step's forward pass.

    The other ranks wait for it. `is_held` tells when so many runs have come there; `release` lets
    all go on, also those that come there later.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        folder.mkdir(exist_ok=True)
        for left in folder.iterdir():
            left.unlink()
        self._folder = folder
        fault = Fault(phase="forward", at="layer", layer=0, action="hold", rank=0, step=step)
        self._mark = arm(fault, folder).mark
        self.environment = hold_environment(folder)

    def is_held(self, *, runs: int = 1) -> bool:
        """Returns whether so many runs are held or have been."""
        return len(list(self._folder.glob(f"{self._mark.name}.*"))) >= runs

    def release(self) -> None:
        """Lets them go on, and holds none any more."""
        self._mark.with_name("released").touch()
        disarm(self._folder)


def hold_environment(folder: Path) -> dict[str, str]:
    """Returns the environment in which runs are held while the folder has a `Hold`."""
    return variables(folder, python_path=str(ROOT))
