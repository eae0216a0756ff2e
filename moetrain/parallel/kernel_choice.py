"""Which expert backend `auto` takes in a run: measured by one rank, broadcast to all others.

Owns the agreement of the ranks, and the cache of choices, `~/.cache/moetrain/backends.json`. A
choice in the cache stays, so that a repeated run takes the same kernels; deleting the file resets
it. Leaves the timing to moetrain/kernels/autotune.py.
"""

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.atomic_files import write_file
from data_pipeline.locks import locked
from moetrain.kernels import expert_swiglu, refuses, slow_because
from moetrain.kernels.attention import (
    HALF,
    attention_choices,
    attention_is_wrong,
    attention_pass,
    has_flash3,
    use_flash3,
)
from moetrain.kernels.autotune import ExpertShape, machine, measure, seconds_of_backends
from moetrain.kernels.known_answer import answer_of
from moetrain.model import Attention, Transformer
from moetrain.parallel.mesh import Meshes
from moetrain.parallel.reduce import gather_objects, said_by_first_rank

logger = logging.getLogger(__name__)

Measure = Callable[[Sequence[str]], Mapping[str, float]]
"""Returns the seconds of each given backend that runs."""


def settle_backend(
    model: Transformer,
    meshes: Meshes,
    *,
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool = False,
    among: Sequence[str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Sets one backend for all experts of a model, where the setting is `auto`.

    All ranks call it, before the first step. `num_tokens` is the size of a rank's micro-batch, in
    `dtype`; `among` are the backends to try, by default those for the kind of device; of these a
    `deterministic` run takes one that isn't tuned by measuring, and measures none. A backend
    that gives a wrong answer on a rank is left out with a warning. Raises RuntimeError for one that
    the settings name.
    """
    settings = model.settings
    if not settings.is_moe or settings.experts.function != "swiglu":
        return
    named = settings.experts.backend
    if named != "auto":
        if device.type == "cuda" and (
            reason := answer_of(named, device=device, dtype=dtype).reason
        ):
            raise RuntimeError(
                f"model.experts.backend={named}: {reason} ({machine(device)}); use auto, or another"
            )
        return
    loops = None
    if device.type == "cuda":
        loops = slow_because(torch.cuda.get_device_capability(device), dtype)
    if among is None:
        # Where torch's grouped product is a loop, the one of `cpu` waits for the device once.
        among = ("megablocks", "grouped_mm", *(["cpu"] if loops else []))
        among = ("cpu",) if device.type == "cpu" else among
    if deterministic:  # the last: torch's grouped product, or its loop where that is none
        among = tuple(name for name in among if name != "megablocks")[-1:]
    if len(among) == 1:
        for moe in model.moe_layers():
            moe.experts.preferred_backend = among[0]
        return  # the same on all ranks, so that none waits in a collective below
    degree = meshes.topology.expert
    rows, choices = num_tokens, settings.top_k
    if degree > 1:  # one row per assignment; on average a rank receives as many as it sends
        rows, choices = rows * choices, 1
    shape = ExpertShape(
        rows=rows,
        choices=choices,
        exchanged=degree > 1,
        dim=settings.dim,
        hidden=settings.ffn_hidden_dim,
        experts=settings.num_experts // degree,
        dtype=dtype,
        device=device,
    )

    def measured(names: Sequence[str]) -> Mapping[str, float]:
        candidates = {name: functools.partial(expert_swiglu, backend=name) for name in names}
        return seconds_of_backends(shape, candidates, clock=clock)

    backend = backend_of_all_ranks(
        _able(among, shape),
        key=shape.key,
        device=machine(device),
        measured=measured,
        cache=default_cache(),
    )
    if loops and backend != "megablocks" and dist.get_rank() == 0:
        logger.warning("model.experts.backend=auto takes %s: %s", backend, loops)
    for moe in model.moe_layers():
        moe.experts.preferred_backend = backend


def _able(among: Sequence[str], shape: ExpertShape) -> list[str]:
    """Returns the backends that serve a shape here, and that answer rightly."""
    outline, able = shape.outline(), []
    for name in among:
        if refuses(name, *outline) is not None:
            continue
        if reason := answer_of(name, device=shape.device, dtype=shape.dtype).reason:
            logger.warning(
                "backend %s is left out on rank %d (%s): %s",
                *(name, dist.get_rank(), machine(shape.device), reason),
            )
            continue
        able.append(name)
    return able


def settle_attention(
    model: Transformer,
    *,
    batch: int,
    length: int,
    by_document: bool,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> None:
    """Sets one attention kernel for all layers on a GPU, where the setting is `auto`.

    All ranks call it, before the first step. `batch` sequences of `length` are a rank's
    micro-batch; `by_document` says whether attention stops at the ends of documents. A kernel that
    gives a wrong answer on a rank is left out with a warning. A `deterministic` run measures none.
    """
    settings = model.settings
    if device.type != "cuda":
        return
    choice = settings.attention_kernel
    if choice == "auto" and deterministic:
        # The backward pass of the others adds by atomics; torch's own has a flag against that.
        choice = "flash" if dtype in HALF else "efficient"
    if choice == "auto":
        heads: dict[str, Any] = {
            "heads": settings.num_heads,
            "kv_heads": settings.num_kv_heads,
            "head_dim": settings.head_dim,
        }
        able = []
        for name in attention_choices(
            torch.cuda.get_device_capability(device),
            dtype,
            by_document=by_document,
            has_flash3=has_flash3(),
        ):
            if reason := attention_is_wrong(name, **heads, device=device, dtype=dtype):
                logger.warning("attention kernel %s is left out: %s", name, reason)
            else:
                able.append(name)

        def measured(names: Sequence[str]) -> Mapping[str, float]:
            shape = (batch, heads["heads"], length)
            kv = {name: heads[name] for name in ("kv_heads", "head_dim")}
            like: dict[str, Any] = {"rounded": dtype, "dtype": dtype, "device": device}
            passes = {n: attention_pass(n, shape=shape, **kv, **like) for n in names}
            return measure(passes, synchronise=torch.cuda.synchronize)

        choice = backend_of_all_ranks(
            able,
            key=f"attention, {machine(device)}, {dtype}, {heads}, batch {batch}, length {length}, "
            f"by document {by_document}",
            device=machine(device),
            measured=measured,
            cache=default_cache(),
            otherwise="flash" if dtype in HALF else "efficient",
        )
    use_flash3(choice == "flash3")
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = choice


def backend_of_all_ranks(
    able: Sequence[str],
    *,
    key: str,
    device: str,
    measured: Measure,
    cache: Path | None,
    otherwise: str = "cpu",
) -> str:
    """Returns one backend on all ranks: the first rank's choice of those that all can run.

    All ranks call it, each with the backends that it can run. Only the first rank measures and
    uses its cache. Where the ranks have no backend in common the result is `otherwise`: by default
    `cpu`, which takes any shape. Raises RuntimeError on all ranks where the first can't choose.
    """
    ranks = gather_objects((device, tuple(able)))
    common = [name for name in ranks[0][1] if all(name in names for _, names in ranks)]

    def chosen() -> str:
        for rank, (other, _) in enumerate(ranks):
            if other != ranks[0][0]:
                logger.warning(
                    "rank %d computes with %s and rank 0 with %s: the expert backend is chosen by "
                    "what rank 0 measures",
                    *(rank, other, ranks[0][0]),
                )
        if len(common) < 2:
            return common[0] if common else otherwise
        try:
            return fastest(common, key=key, measured=measured, cache=cache)
        except torch.OutOfMemoryError:
            # Not cached: the next run measures again. grouped_mm needs no memory for padding.
            return "grouped_mm" if "grouped_mm" in common else common[0]

    return said_by_first_rank(chosen)


def fastest(candidates: Sequence[str], *, key: str, measured: Measure, cache: Path | None) -> str:
    """Returns the candidate that takes the least time, from the cache where it has the key.

    A cache that is None, or can't be read or written, is no error. If two runs measure at the same
    time, the first to write decides for both. Raises what `measured` raises.
    """
    known = str(_read(cache).get(key, {}).get("fastest"))
    if known in candidates:
        return known
    seconds = measured(candidates)
    best = min(seconds, key=lambda name: seconds[name])
    logger.info("%s is the fastest of %s for %s", best, seconds, key)
    kept = _write(cache, key, best, seconds)
    return kept if kept in candidates else best  # the cached one may not be a candidate now


def default_cache() -> Path | None:
    """Returns the cache file, in XDG_CACHE_HOME or else in ~/.cache; None without a home."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder.startswith("~") or (os.environ.get("HOME") == "" and folder == "/.cache"):
        return None
    return Path(folder) / "moetrain" / "backends.json"


def _read(cache: Path | None) -> dict[str, dict[str, Any]]:
    """Returns the file's entries; empty where it is missing or not in this module's format."""
    if cache is None:
        return {}
    try:
        entries = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: entry for key, entry in entries.items() if isinstance(entry, dict)}


def _write(cache: Path | None, key: str, best: str, seconds: Mapping[str, float]) -> str:
    """Adds an entry by replacing the whole file; returns the choice that the file now holds."""
    if cache is None:
        return best
    try:
        with locked(cache.with_suffix(".lock")):
            entries = _read(cache)
            if str(entries.get(key, {}).get("fastest")) not in seconds:
                entries[key] = {"fastest": best, "seconds": dict(seconds)}
                write_file(cache, json.dumps(entries, indent=1), durable=False)
            return str(entries[key]["fastest"])
    except OSError as error:
        logger.warning("%s can't be written, so the next start measures again: %s", cache, error)
        return best
