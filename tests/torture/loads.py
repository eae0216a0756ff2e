"""Loads corrupted folders on real ranks, and judges the results."""

import logging
import os
import random
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint.folders import next_attempt
from moetrain.checkpoint.manifest import CheckpointError
from moetrain.checkpoint.store import CheckpointStore
from moetrain.settings import CheckpointSettings
from tests.torture.attempts import Attempt
from tests.torture.content import as_bytes, equal, read_plainly
from tests.torture.corruptions import FLIPS, STRUCTURE, Kind
from tests.torture.hostile import HOSTILE
from tests.torture.tally import Tally

_GROUPS = {"flips": FLIPS, "structure": STRUCTURE, "hostile": HOSTILE}
_NAMES = {
    "flips": "single flipped bits",
    "structure": "truncated, removed, swapped, added",
    "hostile": "manifests written with intent",
}


def torture_by_harm(pristine: Path, folder: Path, *, group: str, num: int, seed: int) -> Tally:
    """Corrupts copies of a folder in the ways of a group; returns the results of loading each."""
    tally = Tally(_NAMES[group])
    arguments = (pristine, folder / group, group, num, seed)
    with Attempt(load_corrupted, *arguments, log=folder / f"{group}.log") as attempt:
        cases = attempt.result(within=900)
    for outcome, note, problem in cases:
        tally.add(outcome, note=note, problem=problem)
    return tally


def load_corrupted(
    pristine: Path, work: Path, group: str, num: int, seed: int
) -> list[tuple[str, str, str]]:
    """Corrupts, loads and judges as one rank; the first returns each outcome, kind and problem."""
    logging.disable()  # each rejection would be a line
    loader = _Loader(pristine, work)
    verdicts = []
    kinds = _GROUPS[group]
    for number in range(num):
        kind = kinds[number % len(kinds)]  # each at least once, if there are enough cases
        verdict = loader.try_one(kind, random.Random(f"{group} {seed} {number}"))
        if verdict:
            outcome, problem = verdict
            verdicts.append((outcome, kind.name, f"case {number}: {problem}" if problem else ""))
    return verdicts


class _Loader:
    """One rank's store on a folder that is restored, then corrupted, for each load."""

    def __init__(self, pristine: Path, work: Path) -> None:
        self.pristine, self.work = pristine, work
        self.saved = {
            int(f.name.removeprefix("step_")): read_plainly(f) for f in pristine.glob("step_*")
        }
        some, _ = next(iter(self.saved.values()))
        self.targets = {name: torch.empty_like(tensor) for name, tensor in some.items()}
        self.leads = dist.get_rank() == 0
        self.events: list[str] = []
        self.store: CheckpointStore | None = None

    def try_one(self, kind: Kind, draw: random.Random) -> tuple[str, str] | None:
        """Returns on the first rank the outcome of a corruption, and what is wrong with it."""
        corrupted = None
        if self.leads:
            self._restore()
            corrupted = kind.corrupt(self.work, draw)
        dist.barrier()
        if self.store is None:
            self.store = self._open()
        self.events.clear()
        for target in self.targets.values():
            as_bytes(target).fill_(0xA5)
        state, error, clean = None, "", True
        try:
            manifest = self.store.load_newest(lambda _: self.targets, same_model=_any_model)
            state = manifest and manifest.state
        except Exception as failure:
            error, clean = (
                f"{type(failure).__name__}: {failure}",
                isinstance(failure, CheckpointError),
            )
            self.store = None  # its group may be out of step
        if state is not None and not isinstance(state, dict):
            error, clean, state = f"the state that was loaded is {state!r}", False, None
        same = state is not None and self._is_what_was_saved(self.targets, state)
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, (state and state["step"], same, error, clean))
        if any(answer[2] for answer in answers):
            self.store = None
        return self._judge(kind, corrupted, answers) if corrupted is not None else None

    def _judge(self, kind: Kind, corrupted: set[int], answers: list[Any]) -> tuple[str, str]:
        expected = max(self.saved.keys() - corrupted)
        if (self.work / "unpickled").exists():
            return "silent", "a pickle was run"
        if errors := [error for _, _, error, _ in answers if error]:
            if kind.may_refuse and all(clean for _, _, _, clean in answers):
                return "detected", ""
            return "lost", f"loading failed: {errors[0]}"
        step, named = answers[0][0], bool(self.events)
        if step is None:
            return "lost", "nothing was found to load"
        if any(answer[0] != step for answer in answers):
            return "silent", f"ranks loaded steps {[answer[0] for answer in answers]}"
        if not all(same for _, same, _, _ in answers):
            return "lost" if named else "silent", f"step {step} was loaded with other content"
        if step < expected:
            return "lost", f"step {step} was loaded and {expected} is intact: {self.events}"
        newest = max(self.saved)
        if step < newest and not named:
            return "silent", f"step {step} was loaded, and nothing said why not {newest}"
        try:
            if next_attempt(self.work) <= 1:
                return "lost", "the next attempt is not newer than those before"
        except OSError as error:  # where somebody made a folder of the file
            named = named or str(self.work / "attempt") in str(error)
        return ("detected" if named else "survived"), ""

    def _is_what_was_saved(self, targets: dict[str, Tensor], state: dict[str, Any]) -> bool:
        tensors, expected = self.saved.get(state.get("step", -1), ({}, {}))
        return state == expected and equal(targets, tensors)

    def _restore(self) -> None:
        """Restores the folder, with hard links."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.pristine, self.work, copy_function=os.link)

    def _open(self) -> CheckpointStore:
        tell: Callable[..., None] = lambda kind, **fields: self.events.append(  # noqa: E731
            f"{kind}: {fields.get('reason')}"
        )
        return CheckpointStore(
            self.work,
            CheckpointSettings(),
            attempt=10**6,
            config={},
            mesh={},
            timeout=timedelta(seconds=10),
            event=tell,
        )


def _any_model(_: Any) -> None:
    pass
