"""Means of a few seeds, and what can be said of their differences.

Pure: it takes numbers. Student's t, because three seeds tell little of their own spread. Its
integral is mpmath's incomplete beta function, which comes with torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

from mpmath import betainc, findroot

CONFIDENCE = 0.95
"""Of every interval; differences with a corrected p-value below the rest are outside the noise."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and how well it is known; None where there are too few values to say."""

    mean: float
    n: int
    deviation: float | None
    """The sample standard deviation."""
    low: float | None
    high: float | None
    """The 95% confidence interval of the mean."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between the means of two arms."""

    value: float
    method: str
    """`paired`, `welch`, or `none` where a single seed tells nothing of the noise."""
    n: int
    """Pairs, or the values of the smaller arm."""
    low: float | None = None
    high: float | None = None
    """The 95% confidence interval of this one difference."""
    p: float | None = None
    """How probable a difference of this size is by noise alone."""


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of some values, one at least."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return Estimate(mean=mean, n=n, deviation=None, low=None, high=None)
    deviation = stdev(values)
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Estimate(mean=mean, n=n, deviation=deviation, low=mean - half, high=mean + half)


def paired(ours: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Returns the mean difference of pairs: the noise that both of a pair share cancels."""
    each = [a - b for a, b in zip(ours, baseline, strict=True)]
    value, n = fmean(each), len(each)
    if n < 2:
        return Difference(value=value, method="none", n=n)
    return _difference(value, error=stdev(each) / math.sqrt(n), freedom=n - 1, n=n, method="paired")


def welch(ours: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Returns the difference of two means whose values have nothing in common (Welch, 1947)."""
    value, n = fmean(ours) - fmean(baseline), min(len(ours), len(baseline))
    if n < 2:
        return Difference(value=value, method="none", n=n)
    left, right = (stdev(values) ** 2 / len(values) for values in (ours, baseline))
    whole = left + right
    parts = left**2 / (len(ours) - 1) + right**2 / (len(baseline) - 1)
    freedom = whole**2 / parts if parts else math.inf
    return _difference(value, error=math.sqrt(whole), freedom=freedom, n=n, method="welch")


def _difference(value: float, *, error: float, freedom: float, n: int, method: str) -> Difference:
    if error == 0 or not math.isfinite(freedom):  # all seeds give the same
        p = 1.0 if value == 0 else 0.0
        return Difference(value=value, method=method, n=n, low=value, high=value, p=p)
    half = t_quantile(freedom) * error
    return Difference(
        value=value, method=method, n=n, low=value - half, high=value + half,
        p=two_sided(value / error, freedom),
    )  # fmt: skip


def two_sided(t: float, freedom: float) -> float:
    """Returns the probability of a |t| at least this large with Student's distribution."""
    return float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


@cache
def t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Returns the t that a share `confidence` of Student's distribution lies within: ±t."""
    high = 1.0
    while two_sided(high, freedom) > 1 - confidence:
        high *= 2
    return float(
        findroot(
            lambda t: two_sided(float(t), freedom) - (1 - confidence),
            (high / 2, high),
            solver="anderson",
            tol=1e-20,
        )
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns p-values corrected for their number (Holm, 1979).

    With m comparisons of equal arms, one of the corrected values is below 0.05 in one of twenty
    cases at most.
    """
    corrected: dict[str, float] = {}
    least = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda entry: entry[1])):
        least = max(least, min(1.0, (len(p_values) - place) * p))
        corrected[name] = least
    return corrected
