"""`python -m tests.torture [kills=200] [flips=400] [damages=200] [rounds=60] [disks=40] [seed=0]`

Breaks checkpoints in that many ways, in a new folder within `to=` (or in the temporary folder), and
prints a table of the results as Markdown. If anything was lost or loaded silently, it exits with 1
and the folder is kept.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data_pipeline.commands.standard_streams import ignore_broken_pipes
from tests.torture.disks import torture_by_disks
from tests.torture.kills import torture_by_kills
from tests.torture.loads import torture_by_harm
from tests.torture.rivals import torture_by_rivals
from tests.torture.tally import TERMS, Tally, table
from tests.torture.undisturbed import run_undisturbed

NUMBERS = {"kills": 200, "flips": 400, "damages": 200, "rounds": 60, "disks": 40, "seed": 0}
NUM_STEPS = 30


def main(arguments: list[str]) -> int:
    """Runs all cases; returns the exit code."""
    values = {name: str(number) for name, number in NUMBERS.items()} | {"to": ""}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in values or (name != "to" and not value.isdigit()):
            print(f"{argument}: {__doc__}", file=sys.stderr)
            return 2
        values[name] = value
    numbers = {name: int(values[name]) for name in NUMBERS}
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="torture_", dir=values["to"] or None)).resolve()
    tallies = torture(folder, **numbers)
    print(heading(time.monotonic() - start, numbers))
    print(table(tallies))
    if any(tally.bad for tally in tallies):
        print(f"\nwhat they left is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def torture(
    folder: Path, *, kills: int, flips: int, damages: int, rounds: int, disks: int, seed: int
) -> list[Tally]:
    """Runs that many cases of each kind; returns their results."""
    whole = run_undisturbed(folder, num_steps=NUM_STEPS)
    tallies: list[Tally] = []

    def done(*more: Tally) -> None:
        tallies.extend(more)
        print(*(f"{t.name}: {t.tried}, bad {t.bad}" for t in more), sep="\n", file=sys.stderr)

    for group, num in (("flips", flips), ("structure", damages), ("hostile", damages)):
        done(torture_by_harm(whole.pristine, folder, group=group, num=num, seed=seed))
    done(*torture_by_disks(folder / "disks", num=disks, seed=seed))
    done(*torture_by_rivals(folder / "rivals", num_rounds=rounds, seed=seed))
    done(torture_by_kills(folder, whole, num_kills=kills, seed=seed))
    return tallies


def heading(seconds: float, numbers: dict[str, int]) -> str:
    """Returns what a reader needs to know of a table: terms, machine, seed, duration, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    command = " ".join(f"{name}={number}" for name, number in numbers.items())
    return (
        f"{TERMS}\n"
        f"`python -m tests.torture {command}`, commit {commit or 'unknown'}, "
        f"{len(os.sched_getaffinity(0))} cores of {processor()}, "
        f"Linux {platform.release()}, torch {torch.__version__}, {seconds:.0f} s.\n"
    )


def processor() -> str:
    """Returns the processor's name, as Linux has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    ignore_broken_pipes()
    sys.exit(main(sys.argv[1:]))
