"""Which rank hangs and which only wait for it: reads the stacks of ranks without progress."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import takewhile

from moetrain.parallel import STEP_PHASES, Doing

TRAINING = "run_rank"  # the function that trains a rank
# A frame as Python's traceback and as py-spy write it. Only the first has the line's text.
_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line \d+, in (?P<in>\S+)(?:\n    (?P<code>[^\n]+))?'
    r"|^ *(?P<function>\S+) \((?P<path>[^()]+\.py):\d+\)",
    re.MULTILINE,
)
_COLLECTIVES = "torch/distributed/"
_TORCH = re.compile(r"(?:^|/)torch/(?!.*moetrain/)")
# On CUDA the backward pass runs in a thread of autograd's. The rank's own thread waits for it here.
_BACKWARD = "_engine_run_backward"
# Waits for the device, and with it for the collectives that run there.
_DEVICE_WAIT = re.compile(r"\.(?:item|tolist|cpu|numpy)\(\)|\.to\([^)]*cpu|\bsynchronize\(")
_WAITING_FUNCTIONS = (_BACKWARD, "synchronize", "wait_event", "wait_stream")


class Standing(IntEnum):
    """Where a rank without progress stands; the others wait for the one that stands first."""

    in_own_code = 0
    at_device = 1
    """It waits for its device, which computes, or is itself in a collective."""
    in_collective = 2


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One line of a stack."""

    file: str
    function: str
    code: str = ""
    """The text of the line; "" where the stack was read from outside."""


def culprits(
    silent: dict[int, Doing], stacks: dict[int, str], *, unresponsive: set[int]
) -> list[int]:
    """Returns which of the ranks without progress the others wait for; all of them if none stands
    out.

    `unresponsive` ranks don't answer at all, though ranks that wait do. Next come ranks in their
    own code, then those at their device, and of those the ones at the earliest point.
    """
    if found := sorted(unresponsive & silent.keys()):
        return found
    stands = {rank: standing(doing, stacks.get(rank, "")) for rank, doing in silent.items()}
    found = sorted(rank for rank, stand in stands.items() if stand == min(stands.values()))
    least = min(_progress(silent[rank]) for rank in found)
    return [rank for rank in found if _progress(silent[rank]) == least]


def _progress(doing: Doing) -> tuple[int, int]:
    known = doing.phase in STEP_PHASES
    return doing.step, STEP_PHASES.index(doing.phase) if known else len(STEP_PHASES)


def standing(doing: Doing, stacks: str) -> Standing:
    """Returns where a rank stands, by its own report and by its stack."""
    if doing.collective is not None:
        return Standing.in_collective
    return _standing(training_stack(stacks))


def _standing(stack: list[Frame]) -> Standing:
    at_device = bool(stack) and _DEVICE_WAIT.search(stack[0].code) is not None
    # torch's own frames, down to the code that called it: FSDP's gathers and reduce-scatters end in
    # torch's operators and streams.
    for frame in takewhile(lambda frame: _TORCH.search(frame.file), stack):
        if _COLLECTIVES in frame.file:
            return Standing.in_collective
        at_device |= frame.function in _WAITING_FUNCTIONS
    return Standing.at_device if at_device else Standing.in_own_code


def innermost_frame(stacks: str) -> str:
    """Returns the file of the innermost frame of the training; "" without one."""
    stack = training_stack(stacks)
    return stack[0].file if stack else ""


def training_stack(stacks: str) -> list[Frame]:
    """Returns the frames in which a rank trains, innermost first.

    They are those of its own thread, and during a backward pass on CUDA those of autograd's.
    """
    threads = [list(_frames(text)) for text in re.split(r"\n(?=[Tt]hread )", stacks)]
    own = next((t for t in threads if any(f.function == TRAINING for f in t)), [])
    if own and own[0].function == _BACKWARD:
        # Autograd's threads begin in C++: their outermost Python frame is already torch's.
        engines = [t for t in threads if t and t is not own and _TORCH.search(t[-1].file)]
        return min(engines, key=_standing, default=own)
    return own


def _frames(thread: str) -> Iterator[Frame]:
    """Yields the frames of a thread, innermost first."""
    found = [
        Frame(
            file=(m["file"] or m["path"]).replace("\\", "/"),
            function=m["in"] or m["function"],
            code=m["code"] or "",
        )
        for m in _FRAME.finditer(thread)
    ]
    newest_last = 'File "' in thread
    yield from reversed(found) if newest_last else found
