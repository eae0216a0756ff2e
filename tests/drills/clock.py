"""A wall clock that jumps, for some processes only: how they use it, and how it is set.

They preload site/clock.c.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.drills.faults import SITE


def no_clock_because() -> str | None:
    """Returns why there can be no such clock on this machine; None where there can."""
    return None if shutil.which("cc") else "there is no C compiler (cc)"


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A clock of its own."""

    ahead: Path
    """The file with the offset in seconds."""
    environment: dict[str, str]
    """The environment with which a process uses it."""

    @classmethod
    def right(cls, folder: Path) -> "Clock":
        """Returns a clock that doesn't differ from the machine's yet."""
        folder.mkdir()
        library = folder / "clock.so"
        source = str(SITE / "clock.c")
        subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True
        )
        environment = {"LD_PRELOAD": str(library), "DRILL_CLOCK": str(folder / "ahead")}
        clock = cls(ahead=folder / "ahead", environment=environment)
        clock.jump(0)
        return clock

    def jump(self, seconds: int) -> None:
        """Sets the clock so many seconds ahead of the machine's, or behind."""
        # In place, for it is mapped; no page is ever seen half written.
        with self.ahead.open("r+b" if self.ahead.exists() else "wb") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))
