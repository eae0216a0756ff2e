"""Prints how time and memory grow: `python -m benchmarks.scaling [AREA/QUANTITY or AREA …]`.

One JSON object a size and one a case on standard output, a table on standard error; exits with 1
where time grows faster than a case allows. `--list` names the cases. Each size is measured in a
process of its own, so that one size's memory isn't another's.
"""

import argparse
import importlib
import json
import math
import os
import pkgutil
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import benchmarks.scaling
from benchmarks.scaling.case import Case
from data_pipeline.commands.standard_streams import ignore_broken_pipes


def all_cases() -> dict[str, Case]:
    """Returns the cases of every module of this package that has `CASES`, by name."""
    modules = sorted(m.name for m in pkgutil.iter_modules(benchmarks.scaling.__path__))
    found = [
        case
        for name in modules
        if not name.startswith("__")
        for case in getattr(importlib.import_module(f"benchmarks.scaling.{name}"), "CASES", ())
    ]
    return {case.name: case for case in found}


def growth(sizes: list[int], figures: list[float]) -> float:
    """Returns the exponent of the power of the size that fits the three largest figures best."""
    xs = [math.log(size) for size in sizes[-3:]]
    ys = [math.log(max(figure, 1e-9)) for figure in figures[-3:]]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="AREA[/QUANTITY]")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each size")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = all_cases()
    if arguments.one:
        _measure_here(cases, *arguments.one)
        return 0
    wanted = arguments.names or list(cases)
    chosen = [c for n, c in cases.items() if any(n == w or n.startswith(f"{w}/") for w in wanted)]
    if not chosen:
        parser.error(f"no case {' '.join(wanted)}; there are {', '.join(cases)}")
    if arguments.list:
        print("\n".join(f"{case.name}: {case.unit}, {case.sizes}" for case in chosen))
        return 0
    return max([_measure(case, arguments.rounds) for case in chosen])


def _measure(case: Case, rounds: int) -> int:
    seconds, memory = [], []
    for size in case.sizes:
        with tempfile.TemporaryDirectory() as folder:
            _child(case, size, folder, "prepare")
            found = [_child(case, size, folder, "run") for _ in range(rounds)]
        seconds.append(median(f["seconds"] for f in found))
        memory.append(median(f["peak_bytes"] for f in found))
        _print(case, size=size, seconds=seconds[-1], peak_bytes=memory[-1], rounds=rounds)
        print(
            f"{case.name:28} {size:>12,} {case.unit:24} {seconds[-1]:10.3f} s "
            f"{memory[-1] / 2**20:10,.0f} MiB",
            file=sys.stderr,
        )
    exponent = growth(list(case.sizes), seconds)
    _print(
        case,
        time_exponent=round(exponent, 2),
        memory_exponent=round(growth(list(case.sizes), memory), 2),
        max_exponent=case.max_exponent,
    )
    missed = exponent > case.max_exponent
    told = f": more than {case.max_exponent}" if missed else ""
    print(f"{case.name:28} time grows with size^{exponent:.2f}{told}", file=sys.stderr)
    return int(missed)


def _print(case: Case, **figures: float) -> None:
    machine = f"{os.uname().machine}, {os.cpu_count()} cores"
    print(json.dumps({"case": case.name, "unit": case.unit, **figures, "machine": machine}))


def _child(case: Case, size: int, folder: str, part: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--one", case.name, f"{part}:{size}"]
    ran = subprocess.run([*command, folder], stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _measure_here(cases: dict[str, Case], name: str, what: str, folder: str) -> None:
    part, size = what.split(":")
    work = getattr(cases[name], part)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    work(int(size), Path(folder))
    seconds = time.perf_counter() - start
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_bytes": 1024 * max(own, children)}))


if __name__ == "__main__":
    ignore_broken_pipes()
    raise SystemExit(main())
