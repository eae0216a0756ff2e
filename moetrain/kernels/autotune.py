"""Which expert backend is the fastest here, by a measurement that is made once and kept.

Owns the measurement and its file, `~/.cache/moetrain/backends.json`. Leaves to the caller which
backends there are. A choice stays what it was, so that a run repeated takes the same kernels; it
is forgotten by deleting the file.
"""

import fcntl
import functools
import importlib.util
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moetrain.kernels.copies import Copies

REPEATS = 5
Backend = Callable[[Tensor, Tensor, Copies, Tensor, Tensor, Tensor], Tensor]

logger = logging.getLogger(__name__)


def choose_backend(
    x: Tensor,
    gates: Tensor,
    copies: Copies,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    candidates: Mapping[str, Backend],
    cache: Path | None = None,
) -> str:
    """Returns the name of the candidate whose forward and backward is the fastest on this shape.

    A candidate is a function of the six tensors in this order. The measurement needs the memory
    of one more layer for its time, draws no random numbers, communicates with no other rank and
    leaves no gradients. Raises RuntimeError where no candidate runs, and torch.OutOfMemoryError
    where there is no room to try them all.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in (x, gates, gate, up, down)]

    def both_ways(backend: Backend) -> None:
        # Activation checkpointing's hooks would take this for part of what it recomputes.
        plain = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.enable_grad(), plain:
            rows, weights = inputs[:2], inputs[2:]
            out = backend(rows[0], rows[1], copies, *weights)
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    return fastest(
        {name: functools.partial(both_ways, backend) for name, backend in candidates.items()},
        key=shape_key(x, copies, gate),
        cache=cache or default_cache(),
        synchronise=torch.cuda.synchronize if x.is_cuda else _nothing,
    )


def shape_key(x: Tensor, copies: Copies, gate: Tensor) -> str:
    """Returns what a choice hangs on, with the copies rounded up to a power of two."""
    experts, hidden, dim = gate.shape
    num_copies = 1 << max(copies.row.numel() - 1, 0).bit_length()
    dtype = str(x.dtype).removeprefix("torch.")
    return (
        f"{_machine(x.device)}, {dtype}, dim {dim}, hidden {hidden}, experts {experts}, "
        f"copies {num_copies}"
    )


@functools.cache
def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    return f"{name}, torch {torch.__version__}, triton {triton}"


def default_cache() -> Path | None:
    """Returns the file of choices: in XDG_CACHE_HOME, or else in ~/.cache; None without a home."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder.startswith("~") or (os.environ.get("HOME") == "" and folder == "/.cache"):
        return None
    return Path(folder) / "moetrain" / "backends.json"


def _nothing() -> None: ...


def fastest(
    candidates: Mapping[str, Callable[[], object]],
    *,
    key: str,
    cache: Path | None,
    clock: Callable[[], float] = time.perf_counter,
    synchronise: Callable[[], None] = _nothing,
) -> str:
    """Returns the candidate with the least median time, from the cache where it has the key.

    Each is called once to warm up, then all in turn, five times, with `synchronise` before each
    look at the `clock`. One that raises is left out with a warning; where all do, RuntimeError
    has their reasons. Running out of memory says nothing of a candidate and is raised. A cache that
    can't be read or written, or None, is no reason to fail. Of two processes that measure at once
    the first to write decides for both.
    """
    known = _known(cache)
    if known.get(key) not in candidates:
        known[key] = str(_read(cache).get(key, {}).get("fastest"))
    if known[key] not in candidates:
        seconds = _measure(candidates, clock=clock, synchronise=synchronise)
        best = min(seconds, key=lambda name: seconds[name])
        known[key] = _write(cache, key, best, seconds)
        if known[key] not in candidates:
            known[key] = best  # the file's choice, of a process with other candidates
        logger.info("%s is the fastest of %s for %s", best, seconds, key)
    return known[key]


@functools.cache
def _known(cache: Path | None) -> dict[str, str]:
    """Returns what this process knows of a cache file: filled as it asks, never read again."""
    return {}


def _measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    clock: Callable[[], float],
    synchronise: Callable[[], None],
) -> dict[str, float]:
    """Returns the median seconds of each candidate that runs."""

    def timed(call: Callable[[], object]) -> float:
        synchronise()
        start = clock()
        call()
        synchronise()
        return clock() - start

    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    failures: dict[str, str] = {}
    for turn in range(1 + REPEATS):
        for name, call in candidates.items():
            if name in failures:
                continue
            try:
                taken = timed(call)
            except torch.OutOfMemoryError:
                raise  # it may be another moment's: no reason to decide for good
            except Exception as error:  # a backend may refuse the shape
                failures[name] = f"{type(error).__name__}: {error}"
                logger.warning("backend %s is left out: %s", name, failures[name])
                continue
            if turn:  # the first compiles
                seconds[name].append(taken)
    if len(failures) == len(candidates):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise RuntimeError(f"no expert backend runs on this shape: {reasons}")
    return {name: median(taken) for name, taken in seconds.items() if name not in failures}


def _read(cache: Path | None) -> dict[str, dict[str, Any]]:
    """Returns the file's entries; none where it is missing or isn't what this module writes."""
    if cache is None:
        return {}
    try:
        entries = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: entry for key, entry in entries.items() if isinstance(entry, dict)}


def _write(cache: Path | None, key: str, best: str, seconds: dict[str, float]) -> str:
    """Adds an entry, by replacing the file as a whole; returns the choice that stands in it."""
    if cache is None:
        return best
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cache.with_suffix(".lock")):
            entries = _read(cache)
            if str(entries.get(key, {}).get("fastest")) not in seconds:
                entries[key] = {"fastest": best, "seconds": seconds}
                with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
                    json.dump(entries, file, indent=1)
                os.replace(file.name, cache)
            return str(entries[key]["fastest"])
    except OSError as error:
        logger.warning("%s can't be written, so the next start measures again: %s", cache, error)
        return best


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes, which goes with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
