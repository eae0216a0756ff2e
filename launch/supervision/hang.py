"""Which rank hangs and which only wait for it: reads the stacks of ranks without progress."""

import re

from moetrain.parallel import STEP_PHASES, Doing

TRAINING = "run_rank"  # the function that trains a rank
# A frame as Python's traceback and as py-spy write it.
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line \d+|\((?P<path>[^()]+\.py):\d+\)')
_WAITING = ("torch/distributed/", "torch\\distributed\\")


def culprits(
    silent: dict[int, Doing], stacks: dict[int, str], *, unresponsive: set[int]
) -> list[int]:
    """Returns which of the ranks without progress the others wait for; all of them if none stands
    out.

    `unresponsive` ranks don't answer at all, though ranks that wait do. Next come ranks outside any
    collective, and of those the ones at the earliest point: on a GPU the others may wait for their
    device in the middle of their own code.
    """
    if found := sorted(unresponsive & silent.keys()):
        return found
    found = [r for r, doing in silent.items() if not waits(doing, stacks.get(r, ""))]
    found = found or sorted(silent)
    least = min(_progress(silent[rank]) for rank in found)
    return [rank for rank in found if _progress(silent[rank]) == least]


def _progress(doing: Doing) -> tuple[int, int]:
    known = doing.phase in STEP_PHASES
    return doing.step, STEP_PHASES.index(doing.phase) if known else len(STEP_PHASES)


def waits(doing: Doing, stacks: str) -> bool:
    """Returns whether a rank is in a collective, by its own report or by its innermost frame."""
    if doing.collective is not None:
        return True
    return any(sign in innermost_frame(stacks) for sign in _WAITING)


def innermost_frame(stacks: str) -> str:
    """Returns the file of the innermost frame of the training thread; "" without one."""
    for thread in re.split(r"\n(?=[Tt]hread )", stacks):
        if TRAINING not in thread:
            continue
        frames = [m["file"] or m["path"] for m in _FRAME.finditer(thread)]
        newest_last = 'File "' in thread
        return frames[-1 if newest_last else 0] if frames else ""
    return ""
