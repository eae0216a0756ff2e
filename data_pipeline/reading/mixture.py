"""The mixture: the source of each global sample, exact to within one sample at any time.

Owns the meaning of the settings about weights, the assignment of samples to sources, and the part
of a checkpoint about it. Leaves the order inside a source to `order`.

A stage's weights are fractions over a common denominator D. A cycle of D assignments keeps every
source within one sample of its share at any time (R. Tijdeman, "The chairman assignment problem",
Discrete Mathematics 32, 1980). It is repeated indefinitely, so that any sample is found in constant
time.
"""

import difflib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from data_pipeline.settings import DataError, DataSettings

# Weights are exact if their common denominator is at most this, else rounded to multiples of 1 /
# it.
MAX_DENOMINATOR = 100_000


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The mixture from a step on: of every sum(units) samples, units[source] come from a source.

    A source that isn't named is left out.
    """

    from_step: int
    units: dict[str, int]

    @property
    def weights(self) -> dict[str, float]:
        """The share of each source; they sum to one."""
        return {name: units / sum(self.units.values()) for name, units in self.units.items()}


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid")
)
class MixturePosition:
    """The state of a mixture between two steps: what must be kept about the samples drawn so far.

    `units` are the weights of the stage at `next_sample`. They took effect at sample `origin`,
    when `base` samples of each source had been drawn. `drawn` is the same count at `next_sample`.
    """

    next_sample: int
    step: int
    origin: int
    units: dict[str, int]
    base: dict[str, int]
    drawn: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """A range of samples with the same weights; arrays over sources in the folder's order."""

    origin: int
    base: NDArray[np.int64]  # [sources]
    units: NDArray[np.int64]  # [sources]
    cycle: NDArray[np.int16]  # [D], the source of each sample of a cycle
    earlier: NDArray[np.int32]  # [D], how many before it in the cycle are of the same source

    def assigned(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        cycles, places = np.divmod(indices - self.origin, len(self.cycle))
        sources = self.cycle[places]
        return sources, self.base[sources] + cycles * self.units[sources] + self.earlier[places]

    def drawn(self, next_sample: int) -> NDArray[np.int64]:
        cycles, place = divmod(next_sample - self.origin, len(self.cycle))
        return (
            self.base
            + cycles * self.units
            + np.bincount(self.cycle[:place], minlength=len(self.base))
        )


class Mixture:
    """Assigns each global sample to a source, and counts the samples of each.

    After n samples of a stage, |samples of a source - n · its weight| < 1. A stage continues each
    source where the previous stage stopped. With the `position` of an earlier mixture no sample is
    drawn twice or left out: the assignment is what it would have been without an interruption. If
    the weights were changed, a new assignment begins at that sample, and what was drawn still
    counts.

    `stages` begin with one from step 0. The steps of later ones are converted to samples by
    `samples_per_step`, counted from the position.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        stages: Sequence[Stage],
        samples_per_step: int,
        position: MixturePosition | None = None,
    ) -> None:
        self._sources = tuple(sources)
        self._samples_per_step = samples_per_step
        self._step, self._step_sample = 0, 0
        if position:
            self._step, self._step_sample = position.step, position.next_sample
        started = [stage for stage in stages if stage.from_step <= self._step]
        first = self._first_segment(started[-1].units, position)
        self._segments = [first]
        for stage in stages[len(started) :]:
            origin = self._step_sample + (stage.from_step - self._step) * samples_per_step
            base = self._segments[-1].drawn(origin)
            self._segments.append(self._segment(origin, base, stage.units))

    def assigned(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """For global samples [n]: the source of each, and how many samples of it come before.

        Raises ValueError for a sample before those that the position covers.
        """
        sources = np.empty(indices.shape, dtype=np.int16)
        numbers = np.empty(indices.shape, dtype=np.int64)
        origins = np.array([segment.origin for segment in self._segments])
        which = origins.searchsorted(indices, side="right") - 1
        for segment in np.unique(which).tolist():
            inside = which == segment
            if segment < 0:
                raise ValueError(self._too_early(int(indices.min())))
            sources[inside], numbers[inside] = self._segments[segment].assigned(indices[inside])
        return sources, numbers

    def drawn(self, next_sample: int) -> dict[str, int]:
        """How many of the samples before `next_sample` come from each source."""
        counts = self._segment_at(next_sample).drawn(next_sample)
        return self._by_name(counts)

    def position(self, next_sample: int) -> MixturePosition:
        """What to keep if the next step begins at `next_sample`.

        Raises ValueError if no step begins there.
        """
        step = self.step_at(next_sample)
        if (next_sample - self._step_sample) % self._samples_per_step:
            raise ValueError(f"no step begins at sample {next_sample}")
        segment = self._segment_at(next_sample)
        return MixturePosition(
            next_sample=next_sample,
            step=step,
            origin=segment.origin,
            units=self._by_name(segment.units),
            base=self._by_name(segment.base),
            drawn=self.drawn(next_sample),
        )

    def step_at(self, sample: int) -> int:
        """The number of completed steps when `sample` is the next."""
        return self._step + (sample - self._step_sample) // self._samples_per_step

    def first_after(self, source: str, *, number: int, end: int) -> int | None:
        """The first global sample before `end` that is a source's sample `number` or later.

        The search starts at the position; None if there is none.
        """
        low, high = self._step_sample, end
        if high <= low or self.drawn(high)[source] <= number:
            return None
        while low < high:  # the first sample after which more than `number` are drawn
            middle = (low + high) // 2
            low, high = (
                (low, middle) if self.drawn(middle + 1)[source] > number else (middle + 1, high)
            )
        return low

    def _first_segment(
        self, units: Mapping[str, int], position: MixturePosition | None
    ) -> _Segment:
        if position is None:
            return self._segment(0, np.zeros(len(self._sources), np.int64), units)
        named = {name: number for name, number in position.units.items() if number}
        same = named == dict(units)
        counts = position.base if same else position.drawn
        return self._segment(
            position.origin if same else position.next_sample,
            np.array([counts.get(name, 0) for name in self._sources], np.int64),
            units,
        )

    def _segment(self, origin: int, base: NDArray[np.int64], units: Mapping[str, int]) -> _Segment:
        numbers = np.array([units.get(name, 0) for name in self._sources], np.int64)
        cycle = assignment_cycle(numbers.tolist())
        earlier = np.empty(len(cycle), np.int32)
        for source in np.unique(cycle):
            inside = cycle == source
            earlier[inside] = np.arange(inside.sum())
        return _Segment(origin=origin, base=base, units=numbers, cycle=cycle, earlier=earlier)

    def _segment_at(self, sample: int) -> _Segment:
        for segment in reversed(self._segments):
            if sample >= segment.origin:
                return segment
        raise ValueError(self._too_early(sample))

    def _too_early(self, sample: int) -> str:
        return (
            f"sample {sample} is before {self._segments[0].origin}, from where on this mixture "
            "is known"
        )

    def _by_name(self, counts: NDArray[np.int64]) -> dict[str, int]:
        return dict(zip(self._sources, counts.tolist(), strict=True))


def used_sources(data: DataSettings, *, sources: Sequence[str]) -> tuple[str, ...]:
    """Those of a folder's sources that the settings draw from, in the folder's order.

    All of them, unless `weights` or `epochs` name some. Raises DataError for mutually exclusive
    settings, an unknown source, a weight that isn't a positive number, and stages out of order.
    """
    chosen = [
        f"data.{name}"
        for name, is_set in (
            ("weights", bool(_given(data.weights))),
            ("epochs", bool(_given(data.epochs))),
            ("temperature", data.temperature != 1),
        )
        if is_set
    ]
    if len(chosen) > 1:
        raise DataError(
            f"{' and '.join(chosen)} each say how to mix the sources: give only one of them "
            "(data.weights.NAME=null takes back what a file says of a source)"
        )
    used: set[str] = set()
    for key, given in (("data.weights", data.weights), ("data.epochs", data.epochs)):
        weights = _given(given)
        if weights:
            used |= _checked(weights, key=key, sources=sources)
    used = used or set(sources)
    last_step = 0
    for number, stage in enumerate(data.stages):
        key = f"data.stages[{number}]"
        if stage.from_step <= last_step:
            raise DataError(
                f"{key}.from_step={stage.from_step} isn't after {last_step}, where what is before "
                "it begins: put the stages in the order of their steps"
            )
        last_step = stage.from_step
        used |= _checked(stage.weights, key=f"{key}.weights", sources=sources)
    return tuple(name for name in sources if name in used)


def planned_stages(data: DataSettings, *, sizes: Mapping[str, int]) -> list[Stage]:
    """The stages that validated settings define, for sources with these numbers of sequences.

    Raises DataError if a source's share is too small to represent.
    """
    if given := _given(data.weights):
        weights = {name: Fraction(str(weight)) for name, weight in given.items()}
    elif given := _given(data.epochs):
        weights = {name: Fraction(str(n)) * sizes[name] for name, n in given.items()}
    elif data.temperature == 1:
        weights = {name: Fraction(size) for name, size in sizes.items()}
    else:
        largest = max(sizes.values())  # powers of a ratio stay near one at any temperature
        weights = {
            name: Fraction((size / largest) ** (1 / data.temperature))
            for name, size in sizes.items()
        }
    planned = [Stage(from_step=0, units=exact_units(weights))]
    for stage in data.stages:
        weights = {name: Fraction(str(weight)) for name, weight in stage.weights.items()}
        planned.append(Stage(from_step=stage.from_step, units=exact_units(weights)))
    return planned


def exact_units(weights: Mapping[str, Fraction]) -> dict[str, int]:
    """Integers proportional to weights, whose sum is at most MAX_DENOMINATOR.

    Exact if such integers exist. Else each share is rounded up or down to a multiple of
    1 / MAX_DENOMINATOR; raises DataError for a share below that.
    """
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    denominator = math.lcm(*(share.denominator for share in shares.values()))
    if denominator <= MAX_DENOMINATOR:
        return {name: int(share * denominator) for name, share in shares.items()}
    units = {name: int(share * MAX_DENOMINATOR) for name, share in shares.items()}
    for name, number in units.items():
        if number == 0:
            raise DataError(
                f"source {name!r} would be {float(shares[name]):.2g} of the samples, and shares "
                f"below 1/{MAX_DENOMINATOR:,} can't be kept to: give it more in data.weights, or "
                "leave it out by naming the others only"
            )
    # The largest remainders are rounded up; of equal ones, those of the earlier sources.
    by_remainder = sorted(units, key=lambda name: units[name] - shares[name] * MAX_DENOMINATOR)
    for name in by_remainder[: MAX_DENOMINATOR - sum(units.values())]:
        units[name] += 1
    divisor = math.gcd(*units.values())
    return {name: number // divisor for name, number in units.items()}


def assignment_cycle(units: Sequence[int]) -> NDArray[np.int16]:
    """The sources [sum(units)] of a cycle, in which source s comes units[s] times, evenly spread.

    After any n of them |count of s - n · units[s] / sum(units)| ≤ 1 - 1 / (2k - 2) for k sources
    with positive units. This is Tijdeman's bound; no order improves it for all units. Among the
    samples that can come next without exceeding the upper bound, the one that would first fall
    below the lower bound is taken.
    """
    total, named = sum(units), [source for source, number in enumerate(units) if number]
    if len(named) == 1:
        return np.array(named, dtype=np.int16)
    # Everything times 2k - 2, so that the bound is an integer.
    scale = 2 * len(named) - 2
    bound = scale - 1
    samples = []
    for source in named:
        step = units[source] * scale
        for number in range(units[source]):
            # With sample `number` among the first n, the bound holds from n = `opens` on. Without
            # it, the bound holds up to n = `closes`.
            opens = -(-((number + 1) * scale - bound) * total // step)
            closes = (number * scale + bound) * total // step
            samples.append((opens, closes, source))
    samples.sort()
    cycle, waiting, taken = np.empty(total, dtype=np.int16), list[tuple[int, int]](), 0
    for place in range(total):
        while taken < total and samples[taken][0] <= place + 1:
            heapq.heappush(waiting, samples[taken][1:])
            taken += 1
        cycle[place] = heapq.heappop(waiting)[1]
    return cycle


def position_from(record: Mapping[str, Any]) -> MixturePosition:
    """The position whose `asdict` a record is; raises DataError if it isn't one."""
    try:
        return pydantic.TypeAdapter(MixturePosition).validate_python(record)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"the position in the data is damaged: {where}: {first['msg']}") from error


def _given(weights: Mapping[str, float | None]) -> dict[str, float]:
    return {name: weight for name, weight in weights.items() if weight is not None}


def _checked(weights: Mapping[str, float], *, key: str, sources: Sequence[str]) -> set[str]:
    if not weights:
        raise DataError(f"{key} names no source; there are {', '.join(sources)}")
    for name, weight in weights.items():
        if name not in sources:
            nearest = difflib.get_close_matches(name, sources, n=1, cutoff=0.0)[0]
            raise DataError(
                f"{key} names {name!r}, which isn't in the folder; did you mean {nearest!r}? "
                f"There are {', '.join(sources)}"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(
                f"{key}.{name}={weight} must be a number above zero; a source that isn't named is "
                "left out"
            )
    return set(weights)
