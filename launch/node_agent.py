"""What the supervisor wants to know of a node and its processes, asked on that node itself.

Imports neither torch nor the rest of moetrain: an agent starts in a second and is never busy.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

STACK_SECONDS = 10.0


class NodeAgent:
    """One node's eyes: its answer is the node's sign of life."""

    def ping(self) -> None:
        """Answers."""

    def stacks(self, pids: list[int]) -> dict[int, str]:
        """Returns what each process does: its state, and the Python stacks of all its threads.

        Also of a process that is stopped, or that holds the interpreter's lock: they are read from
        its memory. Where that isn't allowed, the text says so.
        """
        return {pid: f"{_state(pid)}\n{_stacks(pid)}" for pid in pids}


def _state(pid: int) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "the process is gone"
    return next(
        (f"process state: {line.split(None, 1)[1]}" for line in lines if "State:" in line), ""
    )


def _stacks(pid: int) -> str:
    beside = Path(sysconfig.get_path("scripts"), "py-spy")
    program = str(beside) if beside.is_file() else shutil.which("py-spy")
    if program is None:
        return f"no stacks: {sys.executable} has no py-spy (it comes with ray[default])"
    try:
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True, text=True, timeout=STACK_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no stacks: py-spy took longer than {STACK_SECONDS:.0f} s"
    return done.stdout if done.returncode == 0 else f"no stacks: {done.stderr.strip()}"
