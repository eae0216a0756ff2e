"""The account of a run's time, from its events alone.

Owns which time is the run's own, and what each part of it went to. Leaves the distance between two
events to events.py, and writing events to others.

A *life* of a run goes from a `start` to its end: `finish` or `stop` (wanted), `fail`, or nothing if
the driver was killed. Time between a wanted end and the next start isn't the run's. Time after an
unwanted end is, if the run was started again: it should have been training.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from moetrain.kinds import EventKind
from moetrain.observe.events import read_events, timestamps

KINDS = {
    "training": "steps that count",
    "saving": "training waited for a checkpoint",
    "validation": "validation",
    "starting": "from a start on request to the first step",
    "ending": "from the last save to the end",
    "redone": "steps that were lost, and trained again after the resume",
    "detecting": "from the last progress to the detection of a failure",
    "restarting": "from a failure or a move to the next step",
    "down": "nothing ran after a failed or killed run",
}
"""Kinds of a run's time."""

INTERRUPTED = ("redone", "detecting", "restarting", "down")
_SPENT = ("training", "saving", "validation")

# What only a life in progress writes: the last of them was lived to see.
_ALIVE = {
    EventKind.attempt,
    EventKind.data_order,
    EventKind.failure,
    EventKind.move,
    EventKind.restart,
    EventKind.resume,
    EventKind.save,
    EventKind.sign,
    EventKind.settings_changed,
    EventKind.step_skipped,
    EventKind.straggler,
    EventKind.straggler_over,
    EventKind.training,
    EventKind.warning,
    EventKind.wandb,
}

Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A piece of a run's time, in seconds since its first event."""

    kind: str
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Account:
    """The account of a run's time."""

    seconds: Mapping[str, float]
    """Seconds of each of KINDS; together they are `wall`."""
    spans: Sequence[Span]
    """The same in order; saving and validation are inside `training` here. A gap is where the run
    was stopped on request."""
    interruptions: int
    """How often training was interrupted and resumed later."""
    redone_steps: int
    device_seconds: float | None = None
    """The seconds of `training`, each times the ranks of its attempt; None where an older version
    didn't record how many there were."""

    @property
    def wall(self) -> float:
        """The run's own time."""
        return sum(self.seconds.values())

    @property
    def effective(self) -> float | None:
        """Effective training time: the share of steps that count; None before any time."""
        return self.seconds["training"] / self.wall if self.wall > 0 else None

    @property
    def lost(self) -> float:
        """What interruptions cost, from the last step that counts to the next one."""
        return sum(self.seconds[kind] for kind in INTERRUPTED)


def run_account(run_dir: Path | str, *, sign: Event | None = None) -> Account | None:
    """Returns the account of the run in a folder."""
    return account(read_events(Path(run_dir, "events.jsonl")), sign=sign)


def account(events: Iterable[Event], *, sign: Event | None = None) -> Account | None:
    """Returns the account up to the last event, or up to the last heartbeat if given.

    None if it can't be known: no step was begun, or an older version trained without `training`
    events.
    """
    story = _Timeline()
    everything = list(_with_signs(events, sign))
    for event, moment in zip(everything, timestamps(everything), strict=True):
        story.take(event, moment)
    return story.account()


class _Timeline:
    """A run's events, processed in order."""

    def __init__(self) -> None:
        self._told: list[Span | _Training] = []
        self._doing: str | None = None  # None: in no life
        self._since = self._alive = 0.0  # when that began, and the last thing known of this life
        self._down_since: float | None = None
        self._training: _Training | None = None  # this life's newest
        self._unknown = False
        self._broken = False  # since the last step; however often, it is one interruption
        self._interruptions = 0

    def take(self, event: Event, moment: float) -> None:
        """Processes the next event."""
        kind = str(event.get("event"))
        if kind == EventKind.start:
            self._start(moment)
            return
        if self._doing is None:
            if kind != EventKind.training:
                return  # a download before a start, or the last output of another command
            self._begin("starting", moment)
        before = self._alive
        if kind in _ALIVE:
            self._alive = moment
        if kind == EventKind.training:
            self._train(event, moment, before)
        elif kind == EventKind.save:
            self._save(event, moment)
        elif kind == EventKind.sign:
            self._sign(event)
        elif kind == EventKind.failure:
            self._broken = True
            silent = event.get("silent_seconds")
            seen = moment if silent is None else max(before, self._since, moment - silent)
            self._end(seen, step=event.get("step"))
            self._tell("detecting", seen, moment)
            self._begin("restarting", moment)
        elif kind == EventKind.move:
            self._end(moment, step=event.get("step"), wanted=True)
            self._begin("restarting", moment)
        elif kind in (EventKind.finish, EventKind.stop):
            self._end(moment, step=event.get("step"), wanted=True)
        elif kind == EventKind.fail:
            self._broken = True
            self._end(moment)
            self._down_since = moment

    def account(self) -> Account | None:
        """Returns the account; no event may follow."""
        if self._doing == "training" and self._training:
            self._training.in_progress = True
        if self._doing is not None:
            self._end(self._alive)
        stretches = [part for part in self._told if isinstance(part, _Training)]
        if self._unknown or not stretches:
            return None
        seconds, spans, redone_steps = dict.fromkeys(KINDS, 0.0), list[Span](), 0
        device_seconds = 0.0
        limits = _limits(stretches)
        for part in self._told:
            if isinstance(part, Span):
                seconds[part.kind] += part.end - part.begin
                spans.append(part)
                continue
            limit = next(limits)
            spent, rest = part.shares(limit)
            for kind, value in spent.items():
                seconds[kind] += value
            device_seconds += spent["training"] * (part.num_ranks or 0)
            middle = part.begin + sum(spent.values())
            seconds[rest] += part.end - middle
            spans += [
                Span(kind="training", begin=part.begin, end=middle),
                Span(kind=rest, begin=middle, end=part.end),
            ]
            redone_steps += part.redone_steps(limit)
        return Account(
            seconds=seconds,
            spans=[span for span in spans if span.end > span.begin],
            interruptions=self._interruptions,
            redone_steps=redone_steps,
            device_seconds=device_seconds if all(s.num_ranks for s in stretches) else None,
        )

    def _start(self, moment: float) -> None:
        if self._doing is not None:  # the driver was killed
            self._broken = True
            self._end(self._alive)
            self._down_since = self._alive
        down, self._down_since = self._down_since, None
        if down is not None:
            self._tell("down", down, moment)
        self._begin("starting" if down is None else "restarting", moment)
        self._training, self._alive = None, moment

    def _train(self, event: Event, moment: float, before: float) -> None:
        if self._doing == "training":  # the end of the previous attempt was not recorded
            self._end(before)
            self._begin("restarting", before)
            self._broken = True
        self._end(moment)
        self._begin("training", moment)
        step = int(event.get("step") or 0)
        self._training = _Training(
            attempt=event.get("attempt"),
            first_step=step,
            begin=moment,
            num_ranks=event.get("ranks"),
        )
        self._told.append(self._training)
        self._interruptions += self._broken
        self._broken = False

    def _save(self, event: Event, moment: float) -> None:
        if self._training is None:
            self._unknown = True  # what was saved had been trained, by a version without this event
        elif isinstance(step := event.get("step"), int):
            self._training.saves.append((step, moment, event.get("spent")))

    def _sign(self, event: Event) -> None:
        stretch = self._training
        if self._doing == "training" and stretch and stretch.attempt == event.get("attempt"):
            stretch.last_step, stretch.so_far = event.get("step"), event.get("spent")

    def _begin(self, doing: str, moment: float) -> None:
        self._doing, self._since = doing, moment

    def _end(self, moment: float, *, step: int | None = None, wanted: bool = False) -> None:
        """Ends the current span, and with it the life unless another span begins."""
        if self._doing == "training" and self._training:
            self._training.end, self._training.as_wanted = moment, wanted
            self._training.last_step = step if step is not None else self._training.last_step
        elif self._doing is not None:
            self._tell(self._doing, self._since, moment)
        self._doing = None

    def _tell(self, kind: str, begin: float, end: float) -> None:
        self._told.append(Span(kind=kind, begin=begin, end=end))


@dataclass(kw_only=True)
class _Training:
    """The training of one attempt."""

    attempt: object
    first_step: int
    begin: float
    num_ranks: int | None = None
    end: float = inf
    last_step: int | None = None
    """The newest step."""
    as_wanted: bool = False
    """It ended normally: what follows its last save isn't lost."""
    in_progress: bool = False
    """It hasn't ended: what follows its last save isn't lost yet."""
    so_far: Mapping[str, float] | None = None
    """What had been spent at its last heartbeat."""
    saves: list[tuple[int, float, Mapping[str, float] | None]] = field(default_factory=list)
    """Step, time of the commit, and what had been spent up to the step and on saving it."""

    def shares(self, limit: float) -> tuple[dict[str, float], str]:
        """Returns the seconds of what counts, and the kinds of the other time.

        `limit` is the lowest step from which a later attempt resumed.
        """
        save = self._last_save(limit)
        told: Mapping[str, float] = {}
        if save is not None:
            told = save[2] or {"training": save[1] - self.begin}
        if self.in_progress and self.so_far is not None:
            told = self.so_far
        room, spent = self.end - self.begin, {}
        for kind in _SPENT:  # never more than elapsed
            spent[kind] = min(max(0.0, told.get(kind, 0.0)), room)
            room -= spent[kind]
        if self.in_progress:
            return spent | {"training": spent["training"] + room}, "ending"
        return spent, "ending" if self.as_wanted and save == self._last_save(inf) else "redone"

    def redone_steps(self, limit: float) -> int:
        """Returns how many of its steps don't count."""
        if self.in_progress:
            return 0
        kept, newest = self._last_save(limit), self._last_save(inf)
        last = max(self.last_step or 0, newest[0] if newest else self.first_step)
        return max(0, last - (kept[0] if kept else self.first_step))

    def _last_save(self, limit: float) -> tuple[int, float, Mapping[str, float] | None] | None:
        return max((s for s in self.saves if s[0] <= limit), key=lambda s: s[:2], default=None)


def _limits(stretches: Sequence[_Training]) -> Iterator[float]:
    """Yields for each attempt the lowest step from which a later one resumed."""
    limits, limit = [], inf
    for stretch in reversed(stretches):
        limits.append(limit)
        limit = min(limit, stretch.first_step)
    return reversed(limits)


def _with_signs(events: Iterable[Event], newest: Event | None) -> Iterator[Event]:
    """Yields the events, with each heartbeat as one, after the last event of a running life."""
    waiting = list[Event]()  # what a command writes before its `start` can't come before the sign
    for event in events:
        left = event.get("last_sign") if event.get("event") == EventKind.start else None
        if isinstance(left, Mapping):
            yield {**left, "event": EventKind.sign}
        waiting.append(event)
        if event.get("event") == EventKind.start or event.get("event") in _ALIVE:
            yield from waiting
            waiting = []
    if newest is not None:
        yield {**newest, "event": EventKind.sign}
    yield from waiting
