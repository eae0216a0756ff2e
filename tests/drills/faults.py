"""Faults at exact points of a rank's work: their definitions, and whether one was injected.

site/ambush.py injects them, inside the rank.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

SITE = Path(__file__).with_name("site")
VARIABLE = "MOETRAIN_DRILL"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault: which rank, and where in which step."""

    at: str
    """`begin` or `end` of the phase, a `layer`, a `collective` that was begun and isn't waited for
    yet, or a `file` of a checkpoint that is about to be written."""
    phase: str
    layer: int | None = None
    action: str = "kill"
    """`kill`, `stop`, `loop`, `raise`, `out of memory`, or `hold` (tests/support/held_run.py)."""
    rank: int = 1
    step: int = 25
    """Steps taken before."""


# In the middle of each: the model has two layers, and the backward pass reaches the first one last.
# At the optimizer's end this rank's weights have changed, and no other rank knows.
POINTS = {
    "forward": Fault(phase="forward", at="layer", layer=1),
    "all-to-all": Fault(phase="forward", at="collective"),
    "backward": Fault(phase="backward", at="layer", layer=0),
    "optimizer": Fault(phase="optimizer", at="end"),
    "save": Fault(phase="save", at="file", step=30),
}


@dataclass(frozen=True, kw_only=True)
class Armed:
    """A fault that is waiting for its point."""

    mark: Path

    def injected(self) -> tuple[float, int] | None:
        """Returns when it was injected and into which process; None if it hasn't been yet."""
        try:
            mark = json.loads(self.mark.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return mark["time"], mark["pid"]


def arm(fault: Fault, folder: Path) -> Armed:
    """Writes the file that processes with `environment(folder)` look into when they start."""
    armed = Armed(mark=folder / "injected.json")
    armed.mark.unlink(missing_ok=True)
    (folder / "fault.json").write_text(json.dumps(asdict(fault) | {"mark": str(armed.mark)}))
    return armed


def disarm(folder: Path) -> None:
    """Removes a fault that hasn't been injected."""
    (folder / "fault.json").unlink(missing_ok=True)


def variables(folder: Path, *, python_path: str) -> dict[str, str]:
    """Returns the environment in which processes look for a fault in a folder."""
    return {"PYTHONPATH": f"{SITE}:{python_path}", VARIABLE: str(folder / "fault.json")}


def on(point: str, action: str, **changes: Any) -> Fault:
    """Returns a fault that acts at one of the points."""
    return replace(POINTS[point], action=action, **changes)
