"""Two attempts at once in one folder: a worker that was cut off comes back next to its successor.

What an attempt saves identifies the attempt, so that what a third one loads shows whose it is.
"""

import random
import re
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetrain.checkpoint.folders import candidates, next_attempt, read_latest
from moetrain.checkpoint.manifest import read_manifest, verify_files
from moetrain.checkpoint.store import CheckpointStore
from moetrain.observe import EventLog, read_events
from moetrain.settings import CheckpointSettings
from tests.torture.attempts import Ambush, Attempt
from tests.torture.content import drawn, equal
from tests.torture.tally import Tally

_NUM_OPERATIONS = 37
"""Of a rank from one save to the next, all of which a stop is tried before."""


def torture_by_rivals(folder: Path, *, num_rounds: int, seed: int) -> list[Tally]:
    """Lets attempts overlap: at random times, and stopped before each operation of a save."""
    at_random = Tally("two attempts at once, at random times")
    stopped = Tally("an old attempt stopped within its save, continued after its successor saved")
    for number in range(num_rounds):
        draw = random.Random(f"rivals {seed} {number}")
        _Round(folder / f"random_{number}", draw).play(at_random, operation=None)
    for number in range(num_rounds):
        draw = random.Random(f"stopped {seed} {number}")
        # All operations in turn, begun with those up to the acknowledgement.
        _Round(folder / f"stopped_{number}", draw).play(
            stopped, operation=number % _NUM_OPERATIONS + 1
        )
    return [at_random, stopped]


class _Round:
    """An old attempt, a new one that takes over, and a third that checks what they left."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        self.checkpoints = folder / "checkpoints"
        self.log = folder / "ranks.log"
        self.where = "at the start"

    def play(self, tally: Tally, *, operation: int | None) -> None:
        """Plays the round, with the old attempt stopped before an operation if one is given."""
        self.folder.mkdir(parents=True)
        try:
            problem = self._overlap(operation)
        except AssertionError as error:
            problem = f"silent: {error}"
        if problem:
            outcome = "silent" if problem.startswith("silent") else "lost"
            tally.add(outcome, note=self.where, problem=f"{self.folder}: {problem}")
        else:
            tally.add("detected", note=self.where)

    def _overlap(self, operation: int | None) -> str | None:
        note = self.folder / "stopped"
        first_save = self.draw.randint(3, 5)
        ambush = operation and Ambush(
            rank=0, save=first_save, operation=operation, number=signal.SIGSTOP, note=note
        )
        with self._attempt(next_attempt(self.checkpoints), 1000, ambush=ambush or None) as old:
            if ambush:
                self._wait_for(note.exists, old)
                time.sleep(0.02)  # the signal follows the note
                self.where = re.sub(r"\d+", "N", note.read_text().strip())
            elif self.draw.random() < 0.5:
                self.where = "old one stopped beside its manifest"
                manifests = f"staged_*{first_save}_attempt_1/manifest.json"
                self._wait_for(lambda: any(self.checkpoints.glob(manifests)), old)
                time.sleep(self.draw.uniform(0.0, 0.004))
                old.send(signal.SIGSTOP, rank=0)
            else:
                self.where = "at any time"
                saved = self.checkpoints / f"step_{first_save:08d}"
                self._wait_for(saved.exists, old)
                time.sleep(self.draw.uniform(0.0, 0.1))
                return self._take_over(old, stopped=False)
            return self._take_over(old, stopped=True)

    def _take_over(self, old: Attempt, *, stopped: bool) -> str | None:
        """Starts the second attempt, continues the first, and returns what is wrong at the end."""
        stops = not stopped and self.draw.random() < 0.5
        if stops:
            old.send(signal.SIGSTOP, rank=self.draw.choice((0, 1, None)))
            time.sleep(self.draw.uniform(0.0, 0.05))
        number = next_attempt(self.checkpoints)
        with self._attempt(number, num_saves := self.draw.randint(1, 4)) as new:
            if not stopped and self.draw.random() < 0.7:
                time.sleep(self.draw.uniform(0.0, 0.5))
                old.send(signal.SIGCONT)
            try:
                new.result(within=60)
            except AssertionError as error:
                return f"the new attempt was disturbed: {error}"
        old.send(signal.SIGCONT)
        if not old.ended(within=60):
            return "the old attempt neither saves nor ends"
        for answer in old.answers():
            if answer is None or answer[0]:  # its folders may have gone: any error will do
                return f"silent: the old attempt ended with {answer}"
        saves = [e for e in read_events(self.folder / "events.jsonl") if e["event"] == "save"]
        acknowledged = [e["step"] for e in saves if e["by"] == number]
        if len(acknowledged) != num_saves:
            return f"silent: {num_saves} saves and {len(acknowledged)} acknowledgements"
        with self._attempt(next_attempt(self.checkpoints), 0) as third:
            state = third.result(within=60)
        if (state["attempt"], state["step"]) != (number, acknowledged[-1]):
            return f"attempt {number} saved step {acknowledged[-1]}; loaded was {state}"
        for folder in candidates(self.checkpoints):
            verify_files(folder, read_manifest(folder))
        latest = read_latest(self.checkpoints)
        if latest is None or not (self.checkpoints / latest).is_dir():
            return f"silent: latest names {latest}, which is not there"
        return None

    def _attempt(self, number: int, num_saves: int, *, ambush: Ambush | None = None) -> Attempt:
        return Attempt(
            save_on, self.folder, number, num_saves, self.draw.uniform(0.0, 0.02),
            directory=self.folder, ambush=ambush, log=self.log,
        )  # fmt: skip

    def _wait_for(self, condition: Any, attempt: Attempt) -> None:
        until = time.monotonic() + 60
        while not condition():
            assert not attempt.any_ended(), f"the attempt ended early: {attempt.answers()}"
            assert time.monotonic() < until, "nothing happened for a minute"
            time.sleep(0.0002)


def save_on(folder: Path, attempt: int, num_saves: int, pause_seconds: float) -> dict[str, Any]:
    """Resumes from the newest checkpoint and saves that many steps; returns the state it loaded."""
    log = EventLog(folder / "events.jsonl")
    store = CheckpointStore(
        folder / "checkpoints",
        CheckpointSettings(keep_last=2, async_save=attempt % 2 == 0),
        attempt=attempt,
        config={},
        mesh={},
        timeout=timedelta(seconds=60),
        event=partial(log.write, by=attempt),
    )
    targets = drawn(attempt=0, step=0)
    manifest = store.load_newest(lambda _: targets, same_model=lambda _: None)
    loaded = manifest.state if manifest else {"attempt": 0, "step": 0}
    assert equal(targets, drawn(attempt=loaded["attempt"], step=loaded["step"])), loaded
    first = loaded["step"] + 1
    for step in range(first, first + num_saves):
        state = {"attempt": attempt, "step": step}
        store.save(drawn(attempt=attempt, step=step), step=step, state=state)
        time.sleep(pause_seconds)
    store.wait()
    dist.barrier()
    return loaded
