"""Runs killed at random moments around their saves, again and again, until they are done.

After every kill, from outside: every checkpoint is bit for bit the undisturbed run's, and nothing
that a `save` event acknowledged is lost. At the end: the same metrics and weights as if nothing
had happened.
"""

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from moetrain.checkpoint.folders import broken, candidates, newest_good, next_attempt, read_latest
from moetrain.checkpoint.manifest import CheckpointError, Manifest, read_manifest, verify_files
from moetrain.observe import read_events
from tests.support.runs import metrics_of
from tests.torture.attempts import Ambush, Attempt, train
from tests.torture.content import digest
from tests.torture.corruptions import flip
from tests.torture.tally import Tally
from tests.torture.undisturbed import Undisturbed, configured

KEEP_LAST, KEEP_EVERY = 2, 7
_TIMEOUT_SECONDS = 120.0


class Lost(Exception):
    """A promise that a kill broke."""


def torture_by_kills(folder: Path, whole: Undisturbed, *, num_kills: int, seed: int) -> Tally:
    """Trains runs to their ends with that many kills; returns their results."""
    tally = Tally("kills during saves (runs went on to their ends)")
    draw, number = random.Random(f"kills {seed}"), 0
    while tally.tried < num_kills:
        assert number < 10 + num_kills, "runs come to their ends and no kill meets them"
        Run(folder / f"run_{number}", whole, async_save=number % 2 == 0, draw=draw).torture(
            tally, num_kills=num_kills
        )
        number += 1
    tally.notes["runs"] = number
    return tally


class Run:
    """One run with kills: what it has promised so far, and whether that holds."""

    def __init__(
        self, folder: Path, whole: Undisturbed, *, async_save: bool, draw: random.Random
    ) -> None:
        self.folder, self.whole, self.draw = folder, whole, draw
        self.config = configured(
            folder,
            shards=whole.shards,
            num_steps=whole.num_steps,
            checkpoint__async_save=async_save,
            checkpoint__keep_last=KEEP_LAST,
            checkpoint__keep_every=KEEP_EVERY,
        )
        self.checkpoints = folder / "runs/tiny/checkpoints"
        self.acknowledged: set[int] = set()
        self.corrupted: set[tuple[int, int]] = set()
        """Step and attempt of checkpoints in which this test flipped a bit."""
        self.inodes: dict[int, tuple[int, int]] = {}
        """Attempt and inode of those that existed at the last kill."""
        self.newest = 0
        self.num_events = 0
        self.new_events: list[dict[str, Any]] = []
        """Those of the last attempt."""

    def torture(self, tally: Tally, *, num_kills: int) -> None:
        """Starts attempts and kills them, until one finishes or the kills are used up."""
        self.folder.mkdir()
        while True:
            where = "spared"
            try:
                number = next_attempt(self.checkpoints)
                killed = self._attempt(number, spared=tally.tried >= num_kills)
                where = self._where(number)
                fell_back = self._went_on_from_the_newest()
                if not killed:
                    self._is_as_if_undisturbed()
                    break
                self._holds()
            except Lost as error:
                tally.add("lost", note=where, problem=f"{self.folder}: {error}")
                return
            except AssertionError as error:
                tally.add("silent", note=where, problem=f"{self.folder}: {error}")
                return
            tally.add("detected" if fell_back else "survived", note=where)
            if self.draw.random() < 0.1:
                self._harm_the_newest()
        shutil.rmtree(self.folder)

    def _attempt(self, number: int, *, spared: bool) -> bool:
        """Runs an attempt, to its end or to a kill; returns whether it was killed."""
        note = self.folder / f"killed_{number}"
        log = self.folder / f"ranks_{number}.log"
        rank = self.draw.choice((0, 1, None))  # None: the whole process group
        ambush = None
        if not spared and self.draw.random() < 0.5:
            ambush = Ambush(
                rank=rank or 0,
                save=self.draw.choice((1, 1, 2, 3, 4)),
                operation=self._draw_operation(rank),
                whole_group=rank is None,
                note=note,
            )
        with Attempt(
            train, self.config, number, directory=self.folder / "runs", ambush=ambush, log=log
        ) as attempt:
            killed = not spared and not ambush and self._inject(attempt, number, rank)
            until = time.monotonic() + _TIMEOUT_SECONDS
            while not attempt.any_ended() and time.monotonic() < until:
                time.sleep(0.002)
            killed = killed or note.exists()
            # The other rank may stay alive for a while, as on another machine.
            ended = attempt.ended(within=self.draw.uniform(0.0, 0.5) if killed else 60.0)
            answers = attempt.answers()
        events = read_events(self.folder / "runs/tiny/events.jsonl")
        self.new_events, self.num_events = events[self.num_events :], len(events)
        if not killed and not ended:
            raise Lost(f"attempt {number} hangs, though nobody killed it; see {log}")
        if not killed and not all(answer and answer[0] for answer in answers):
            raise Lost(f"attempt {number} failed, though nobody killed it: {answers}")
        return killed

    def _draw_operation(self, rank: int | None) -> int:
        """Returns which operation of a save: mostly of the commit, else of what follows it.

        On rank 0 the folder is staged by the 1st, renamed by the 6th, named in `latest` by the
        10th, acknowledged at the 13th; then come reading back and deletion, up to some 35th. Rank 1
        only opens its file and reads back.
        """
        if rank == 1:
            return self.draw.randint(1, 7)
        first, last = self.draw.choice(((1, 13), (1, 13), (14, 36), (27, 36)))
        return self.draw.randint(first, last)

    def _inject(self, attempt: Attempt, number: int, rank: int | None) -> bool:
        """Kills at a random moment of a save, or of what is around it."""
        if self.draw.random() < 0.05:
            time.sleep(self.draw.uniform(0.0, 1.0))  # joining, loading
        else:
            saves = self.draw.choice((1, 1, 2, 2, 3, 4))
            delay = self.draw.uniform(0.0, 1.1 * self.whole.save_seconds)
            seen: set[str] = set()
            while len(seen) < saves:
                if attempt.any_ended():
                    return False
                seen |= {f.name for f in self.checkpoints.glob(f"staged_*_attempt_{number}")}
                time.sleep(0.001)
            time.sleep(delay)
        if attempt.any_ended():
            return False
        attempt.send(signal.SIGKILL, rank=rank)
        return True

    def _where(self, number: int) -> str:
        """Returns what the killed attempt was doing, as its folder shows."""
        names = {f.name for f in self.checkpoints.iterdir()}
        staged = [n for n in names if n.startswith("staged_") and n.endswith(f"_{number}")]
        for name in staged:
            files = {f.name: f.stat().st_size for f in (self.checkpoints / name).iterdir()}
            if "manifest.json" in files:
                return "manifest written, not renamed"
            if not files:
                return "folder staged, no file yet"
            return "files being written"
        if any(n.startswith("deleted_") and n.endswith(f"_{number}") for n in names):
            return "old ones being deleted"
        saved = [m.step for m in self._manifests() if m.attempt == number]
        if not saved:
            return "before the first save"
        if read_latest(self.checkpoints) != f"step_{max(saved):08d}":
            return "renamed, latest still behind"
        if max(saved) not in self._saved_by_the_last():
            return "latest moved, not yet acknowledged"
        return "after the save: the newest read back, or training"

    def _holds(self) -> None:
        """Raises Lost, or AssertionError if something exists but isn't what it should be."""
        if found := broken(self.checkpoints):
            raise Lost(f"a broken folder: {found}")
        good, present, standing = set(), set(), set()
        for manifest in self._manifests():
            folder = self.checkpoints / f"step_{manifest.step:08d}"
            present.add(manifest.step)
            standing.add((manifest.step, manifest.attempt))
            corrupted = (manifest.step, manifest.attempt) in self.corrupted
            attempt, inode = self.inodes.get(manifest.step, (manifest.attempt, 0))
            if attempt != manifest.attempt and inode == folder.stat().st_ino:
                raise Lost(f"{folder.name} of attempt {attempt} was written into")
            try:
                verify_files(folder, manifest)
            except CheckpointError as error:
                if corrupted:
                    continue
                raise Lost(str(error)) from error
            assert not corrupted, f"{folder.name} verifies, with a bit of it flipped"
            same = digest(folder) == self.whole.digests[manifest.step]
            assert same, f"{folder.name} is not the undisturbed run's"
            good.add(manifest.step)
        self.inodes = {  # the inode of a deleted one may be reused
            step: (attempt, inode)
            for step, (attempt, inode) in self.inodes.items()
            if (step, attempt) in standing
        }
        for step in sorted(self.acknowledged - present):
            if step % KEEP_EVERY == 0 or len([p for p in present if p > step]) < KEEP_LAST:
                raise Lost(f"step {step} was acknowledged and is gone; there are {sorted(good)}")
            self.acknowledged.discard(step)  # retention deleted it
        newest = max(good, default=0)
        if newest < self.newest:
            raise Lost(f"the newest was of step {self.newest} and is of {newest}")
        self.newest = newest

    def _went_on_from_the_newest(self) -> bool:
        """Returns whether the last attempt fell back; raises Lost if further than it had to."""
        resumed = [e["step"] for e in self.new_events if e["event"] == "resume"]
        if resumed and resumed != [self.newest]:
            raise Lost(f"resumed from {resumed}, the newest was {self.newest}")
        self.acknowledged |= self._saved_by_the_last()
        return bool(resumed) and any(e["event"] == "checkpoint_rejected" for e in self.new_events)

    def _harm_the_newest(self) -> None:
        """Flips a bit of the newest checkpoint, if there is one to fall back to."""
        good = newest_good(self.checkpoints, rejected=lambda name, reason: None)
        others = [f for f in candidates(self.checkpoints) if f != good]
        usable = [f for f in others if self._identity(f) not in self.corrupted]
        if good is None or not usable:
            return
        shard = self.draw.choice(sorted(good.glob("*.safetensors")))
        flip(shard, self.draw)
        step, attempt = self._identity(good)
        self.corrupted.add((step, attempt))
        self.inodes[step] = attempt, good.stat().st_ino
        self.acknowledged.discard(step)
        self.newest = self._identity(usable[0])[0]

    def _identity(self, folder: Path) -> tuple[int, int]:
        manifest = read_manifest(folder)
        return manifest.step, manifest.attempt

    def _manifests(self) -> list[Manifest]:
        return [read_manifest(folder) for folder in candidates(self.checkpoints)]

    def _saved_by_the_last(self) -> set[int]:
        return {e["step"] for e in self.new_events if e["event"] == "save"}

    def _is_as_if_undisturbed(self) -> None:
        assert metrics_of(self.folder) == self.whole.metrics, "other metrics at the end"
        last = digest(candidates(self.checkpoints)[0])
        assert last == self.whole.digests[self.whole.num_steps], "other weights at the end"
