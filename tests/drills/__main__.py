"""`python -m tests.drills [where=single|cluster] [only=NAME,NAME] [rounds=1]`

Injects faults into real runs, in a new folder within `to=` or in the temporary folder, and prints a
table of the results as Markdown. Exits with 1 if a drill failed or missed its target; the folder is
then kept. `where=cluster` needs root and iproute2: its hosts are network namespaces.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.commands.standard_streams import ignore_broken_pipes
from tests.drills import cluster, single_host
from tests.drills.drill import Result, Site, table
from tests.drills.hosts import no_hosts_because
from tests.torture.__main__ import processor

PLACES: dict[str, Mapping[str, Callable[[Any], Result]]] = {
    "single": single_host.DRILLS,
    "cluster": cluster.DRILLS,
}


def main(arguments: list[str]) -> int:
    """Runs the drills; returns the exit code."""
    values = {"where": "single", "only": "", "rounds": "1", "to": ""}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in values:
            return wrong(argument)
        values[name] = value
    if values["where"] not in PLACES or not values["rounds"].isdigit():
        return wrong(" ".join(arguments))
    drills = PLACES[values["where"]]
    chosen = values["only"].split(",") if values["only"] else list(drills)
    if unknown := [name for name in chosen if name not in drills]:
        return wrong(f"only={','.join(unknown)}: there are {', '.join(drills)}")
    if values["where"] == "cluster" and (reason := no_hosts_because()):
        print(f"no drills on a cluster: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="drills_", dir=values["to"] or None)).resolve()
    rounds = [name for _ in range(int(values["rounds"])) for name in chosen]
    if values["where"] == "cluster":
        with cluster.four_hosts(folder) as site:
            results = [tried(drills[name], site) for name in rounds]
    else:
        machine = single_host.this_machine(folder)
        results = [tried(drills[name], machine) for name in rounds]
    command = " ".join(f"{name}={value}" for name, value in values.items() if value)
    print(heading(command, time.monotonic() - start))
    print(table(results).replace(f"{folder}/", ""))
    if any(result.problems or result.is_late for result in results):
        print(f"\nwhat they left is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def tried(drill: Callable[[Any], Result], site: Site) -> Result:
    """Returns the result of a drill, also if it raised."""
    try:
        result = drill(site)
    except Exception as error:  # the other drills' results are still useful
        traceback.print_exc()
        said = str(error).partition("\n")[0]
        result = Result(drill=getattr(drill, "__name__", "drill"), problems=[f"broke off: {said}"])
    print(f"{result.drill}: {result.verdict}", file=sys.stderr, flush=True)
    return result


def wrong(what: str) -> int:
    """Prints what is wrong with the arguments; returns the exit code."""
    print(f"{what}: {__doc__}", file=sys.stderr)
    return 2


def heading(command: str, seconds: float) -> str:
    """Returns what a reader needs to know of a table: machine, duration, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    return (
        f"`python -m tests.drills {command}`, commit {commit or 'unknown'}, "
        f"{len(os.sched_getaffinity(0))} cores of {processor()}, "
        f"Linux {platform.release()}, torch {torch.__version__}, {seconds:.0f} s.\n"
    )


if __name__ == "__main__":
    ignore_broken_pipes()
    sys.exit(main(sys.argv[1:]))
