"""Who hangs, and who only waits for it: reads the stacks of ranks that give no sign of life."""

import re

from moetrain.parallel import Doing

TRAINING = "run_rank"  # the function under which a rank trains
# A frame as Python's traceback and as py-spy write it.
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line \d+|\((?P<path>[^()]+\.py):\d+\)')
_WAITING = ("torch/distributed/", "torch\\distributed\\")


def culprits(silent: dict[int, Doing], stacks: dict[int, str]) -> list[int]:
    """Returns which of the silent ranks the others wait for; all of them where none stands out."""
    found = [r for r, doing in silent.items() if not waits(doing, stacks.get(r, ""))]
    return found or sorted(silent)


def waits(doing: Doing, stacks: str) -> bool:
    """Returns whether a rank is in a collective, by its own word or by its innermost frame."""
    if doing.collective is not None:
        return True
    return any(sign in innermost(stacks) for sign in _WAITING)


def innermost(stacks: str) -> str:
    """Returns the file of the innermost frame of the thread that trains; "" where there is none."""
    for thread in re.split(r"\n(?=[Tt]hread )", stacks):
        if TRAINING not in thread:
            continue
        frames = [m["file"] or m["path"] for m in _FRAME.finditer(thread)]
        newest_last = 'File "' in thread
        return frames[-1 if newest_last else 0] if frames else ""
    return ""
