"""Randomly generated runs: their events as a real run would write them, and the truth."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from random import Random
from typing import Any


class Seconds(defaultdict[str, float]):
    """Seconds of each kind. A Counter counts whole numbers."""

    def __init__(self, *spent: Mapping[str, float]) -> None:
        """Adds up what each of `spent` has."""
        super().__init__(float)
        for one in spent:
            self.add(one)

    def add(self, spent: Mapping[str, float]) -> None:
        for kind, seconds in spent.items():
            self[kind] += seconds


class InventedHistory:
    """A few lives of a run: steps, saves, failures, kills, stops, damaged checkpoints, set dates.

    Everything has the time that it takes from `_pass`; what that was for is written down beside it.
    """

    def __init__(self, chance: Random) -> None:
        self.events: list[dict[str, Any]] = []
        self.happened: Counter[str] = Counter()
        self.interruptions = self.redone_steps = 0
        self._chance, self._now = chance, 0.0
        self._driver = "driver-1"
        self._ranks = "ranks" if chance.random() < 0.3 else None  # else where the driver is
        if self._ranks:
            self.happened["two machines"] += 1
        self._date_off = Seconds()  # of each machine
        self._booted = {"driver-1": chance.uniform(0, 1e6), "ranks": chance.uniform(0, 1e6)}
        self._truth = Seconds()
        # Of each checkpoint that counts: its step, and what went to it since the one before it.
        self._saved: list[tuple[int, Seconds]] = [(0, Seconds())]
        self._attempt = 0
        self._broken = self._date_set_unseen = False
        self._sign: dict[str, Any] | None = None
        ended = "stop"
        for _ in range(chance.randint(1, 5)):
            ended = self._live(after=ended)
            if ended == "finish":
                break
        else:
            self._live(after=ended, to_the_end=True)

    def truth(self) -> Seconds:
        """Returns the seconds of each kind."""
        return Seconds(self._truth, *(spent for _, spent in self._saved))

    def _live(self, *, after: str, to_the_end: bool = False) -> str:
        """Goes from a start to an end; returns which."""
        chance = self._chance
        if self.events:
            between = self._pass(0, 5000)
            if after in ("killed", "fail"):
                self._truth["down"] += between
            # A date that was set unseen, on a machine whose clock began anew, can't be known.
            if not self._ranks and not self._date_set_unseen and chance.random() < 0.3:
                self.happened["reboot"] += 1
                off = self._date_off[self._driver]
                self._driver = f"driver-{len(self._booted)}"
                self._booted[self._driver] = chance.uniform(0, 1e6) - self._now
                self._date_off[self._driver] = off
            elif after != "killed":
                self._maybe_set_a_date()
        self._tell("start", last_sign=self._sign)
        doing = "restarting" if after in ("killed", "fail") else "starting"
        while True:
            ended = self._attempt_once(doing, to_the_end=to_the_end)
            if ended not in ("failure", "move"):
                return ended
            doing = "restarting"

    def _attempt_once(self, doing: str, *, to_the_end: bool) -> str:
        chance = self._chance
        self._truth[doing] += self._pass(1, 60)
        self._maybe_set_a_date()
        if not to_the_end and chance.random() < 0.1:
            return self._break_before_a_step(doing)
        self._attempt += 1
        if chance.random() < 0.15 and len(self._saved) > 2:
            self._roll_back()
        step = first = self._saved[-1][0]
        self._tell("training", by_ranks=True, step=step, attempt=self._attempt)
        self.interruptions += self._broken
        self._broken = False
        begun, saves, since = Seconds(), 0, Seconds()
        last_alive = self._now
        for _ in range(chance.randint(1, 40)):
            since["training"] += self._pass(0.5, 5)
            step += 1
            if chance.random() < 0.1:
                since["validation"] += self._pass(1, 20)
            if chance.random() < 0.3:
                if not to_the_end and chance.random() < 0.1:
                    since["saving"] += self._pass(0, 2)
                    self.happened["failure in a save"] += 1
                    return self._fail(step, since, saved_to=self._saved[-1][0])
                since["saving"] += self._pass(0, 3)
                begun.add(since)
                self._tell("save", by_ranks=True, step=step, spent=dict(begun))
                self._saved.append((step, since))
                since, saves, last_alive = Seconds(), saves + 1, self._now
            if chance.random() < 0.5:
                self._sign = self._times(by_ranks=True) | {
                    "attempt": self._attempt, "step": step, "spent": dict(Seconds(begun, since)),
                }  # fmt: skip
                last_alive = self._now
            self._maybe_set_a_date()
        how = chance.choice(["failure", "killed", "fail", "stop", "move", "finish"])
        if to_the_end:
            how = "finish"
        self.happened[how] += 1
        if how in ("stop", "move", "finish"):
            if self._saved[-1][0] < step:
                since["saving"] += self._pass(0, 3)
                self._tell("save", by_ranks=True, step=step, spent=dict(Seconds(begun, since)))
                self._saved.append((step, Seconds()))
            since["ending"] += self._pass(0, 9)
            self._saved[-1][1].add(since)
            self._tell(how, step=step)
            return how
        if how == "failure":
            since["training"] += self._pass(0, 4)
            return self._fail(step, since, saved_to=self._saved[-1][0])
        saved_to = self._saved[-1][0] if saves else first
        if how == "fail":
            self._lose(since, self._known_step(saved_to), saved_to)
            self._tell("fail")
            self._broken = True
            return how
        # Killed: the time after the last event or heartbeat can't be distinguished from downtime.
        unseen = self._now - last_alive
        self._lose(since, self._known_step(saved_to), saved_to)
        self._truth["redone"] -= unseen
        self._truth["down"] += unseen
        self._broken = True
        return how

    def _known_step(self, saved_to: int) -> int:
        """Returns the last step of this attempt that a save or a heartbeat reports."""
        sign = self._sign
        of_this = sign is not None and sign["attempt"] == self._attempt
        return max(saved_to, sign["step"]) if of_this and sign else saved_to

    def _break_before_a_step(self, doing: str) -> str:
        self._broken = True
        if self._chance.random() < 0.5:
            self.happened["killed before a step"] += 1
            # Known of it is its start, or the failure before; an `attempt` may come on top.
            alive = max((e for e in self.events if e["event"] != "fail"), key=lambda e: e["at"])[
                "at"
            ]
            self._truth[doing] -= self._now - alive
            self._truth["down"] += self._now - alive
            return "killed"
        self.happened["failure before a step"] += 1
        silent = self._pass(0, 10)
        self._truth["detecting"] += silent
        self._tell("failure", silent_seconds=silent)
        return "failure"

    def _fail(self, step: int, since: Seconds, *, saved_to: int) -> str:
        self._lose(since, step, saved_to)
        silent = self._pass(0, 20)
        self._truth["detecting"] += silent
        self._tell("failure", step=step, silent_seconds=silent)
        self._broken = True
        return "failure"

    def _lose(self, spent: Seconds, step: int, saved_to: int) -> None:
        self._truth["redone"] += sum(spent.values())
        self.redone_steps += step - saved_to

    def _roll_back(self) -> None:
        """The newest checkpoint turns out to be damaged."""
        self.happened["rollback"] += 1
        step, spent = self._saved.pop()
        self._lose(spent, step, self._saved[-1][0])

    def _pass(self, least: float, most: float) -> float:
        took = self._chance.uniform(least, most)
        self._now += took
        return took

    def _maybe_set_a_date(self) -> None:
        """Sets the date of a machine that was heard of; the first of another is placed by its."""
        told = {e["clock"][0] for e in self.events}
        everybody = {self._driver} | ({self._ranks} if self._ranks else set())
        if self._chance.random() < 0.1 and everybody <= told:
            self.happened["jump"] += 1
            whose = self._chance.choice(sorted(everybody))
            self._date_off[whose] += self._chance.choice([-1, 1]) * 3600
            self._date_set_unseen = True

    def _times(self, *, by_ranks: bool = False) -> dict[str, Any]:
        machine = self._ranks if by_ranks and self._ranks else self._driver
        date = datetime.fromtimestamp(1.8e9 + self._now + self._date_off[machine], UTC)
        return {
            "time": date.isoformat(),
            "clock": [machine, self._booted[machine] + self._now],
            "at": self._now,
        }

    def _tell(self, kind: str, *, by_ranks: bool = False, **fields: Any) -> None:
        self._date_set_unseen = False
        self.events.append({"event": kind} | self._times(by_ranks=by_ranks) | fields)
