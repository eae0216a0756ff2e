"""How the benchmarks measure: passes in turn, medians, peak memory, JSON lines and a table.

Independent of what is measured. Everything that one case compares is timed in one process, one pass
of each in every round, so that a machine that slows down affects all of them alike.
"""

import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

Pass = Callable[[], object]


def time_in_turn(
    passes: Mapping[str, Pass],
    *,
    rounds: int,
    warmup: int,
    device: torch.device,
    prepare: Pass = lambda: None,
) -> dict[str, list[float]]:
    """Returns the seconds of each pass in each round, without the `warmup` rounds.

    A round runs every pass once, in an order of its own: in a fixed order each pass would always
    find the caches and the allocator as the same other pass leaves them. `prepare` runs before each
    pass, outside its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(-warmup, rounds):
        order = list(passes)
        random.Random(number).shuffle(order)
        for name in order:
            prepare()
            synchronize(device)
            start = time.perf_counter()
            passes[name]()
            synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(run: Pass, device: torch.device) -> int:
    """Returns the most bytes that a pass holds at once, above what was allocated before it.

    On CUDA it is the peak of the caching allocator. On CPU it comes from the profiler's record of
    every allocation and release of torch's allocator, including temporaries inside operators;
    buffers that a matrix library allocates itself are not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    for change in _allocations(run):
        held += change
        peak = max(peak, held)
    return peak


def held_memory(run: Pass, device: torch.device) -> int:
    """Returns how many more bytes are allocated after a pass than before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.memory_allocated(device) - before
    return sum(_allocations(run))


def _allocations(run: Pass) -> list[int]:
    """Returns what torch's CPU allocator allocated (positive) and freed in a pass, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start and stop
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    results = profile.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    return [change for _, change in sorted(changes, key=lambda c: c[0])]  # stable in time


def synchronize(device: torch.device) -> None:
    """Waits until the device has completed its work; does nothing on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: Sequence[float]) -> list[float]:
    """Returns [min, median, max]."""
    return [min(seconds), median(seconds), max(seconds)]


def machine(device: torch.device) -> str:
    """Returns a description of the machine, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} cores"


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.readlines()
    except OSError:
        return []


def print_record(record: Mapping[str, Any]) -> None:
    """Prints one JSON object on standard output, for scripts."""
    print(json.dumps(record), flush=True)


def say(text: str) -> None:
    """Prints on standard error, for people."""
    print(text, file=sys.stderr, flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table on standard error; the first column is left-aligned."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        return f"| {' | '.join(aligned)} |"

    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    body = "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])
    say(f"\n{title}\n\n{body}")
