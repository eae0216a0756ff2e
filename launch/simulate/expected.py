"""Expected effective training time, in closed form, and the interval between saves that is best.

Owns the arithmetic. The model, in seconds: failures come at the rate r, at any moment, with times
between them that are exponential. A run trains for `interval`, waits `save` for a save, and goes
on; the save is safe `durable` after it began, so `lag = durable - save` into the next interval. A
failure takes what was trained since the last save that was safe. It is detected after `detect`,
and `restart` later training resumes from that save; a failure in between begins both anew. A save
is over before the next one begins: `lag <= interval`.

The classic is Young (1974), first order in r, and Daly (2006), whose complete model is this one
with `lag = 0`. With `c = interval + save`, and q the chance that detection and restart meet no
failure, the time until one more interval is safe, failures within failures included, is

    (exp(r (c + lag)) - exp(r lag)) / (r q)

Derivation. Down time after a failure is (1/q - 1) / r: as many tries as it takes, each cut short
by the next failure. Training and saving for u seconds meet r u failures, so that with down time
it takes u / q in all. After a restart the next safe save is c + lag away without a failure, and
(exp(r (c + lag)) - 1) / (r q) with them. In an undisturbed run it is only c away, the lag having
passed when the last save became safe: (1 - exp(-r c)) / (r q), and with probability 1 - exp(-r c)
a failure, down time included, and then the time after a restart. The sum is the line above.

J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (1974);
J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future
Generation Computer Systems 22 (2006).
"""

import math
from dataclasses import dataclass

from launch.simulate.settings import SimulateSettings

SECONDS_A_DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of all time in the long run; the five sum to one."""

    effective: float
    """Training that counts: effective training time."""
    saving: float
    """Waiting for saves, including those that a failure lost."""
    detecting: float
    restarting: float
    redoing: float
    """Training that a failure lost, and that was repeated."""


def failure_rate(settings: SimulateSettings, *, nodes: int) -> float:
    """Returns the failures per second of so many nodes."""
    return nodes * settings.failures_per_1000_node_days / 1000 / SECONDS_A_DAY


def shares(settings: SimulateSettings, *, nodes: int, interval: float) -> Shares:
    """Returns the shares of all time with `interval` seconds of training between saves."""
    rate = failure_rate(settings, nodes=nodes)
    detected = _detected(settings, rate)
    up = detected * math.exp(-rate * settings.restart_seconds)  # q
    save = settings.save_seconds
    lag = settings.durable_seconds - save
    # Each share is a ratio of times for one interval; the powers of e that both have are left
    # out, so that nothing overflows where failures come faster than intervals.
    whole = -math.expm1(-rate * (interval + save))
    training = up * -math.expm1(-rate * interval) / whole
    effective = up * rate * interval * math.exp(-rate * (interval + save + lag)) / whole
    return Shares(
        effective=effective,
        saving=up * math.exp(-rate * interval) * -math.expm1(-rate * save) / whole,
        detecting=1 - detected,
        restarting=detected - up,
        redoing=training - effective,
    )


def best_interval(settings: SimulateSettings, *, nodes: int) -> float:
    """Returns the seconds to train between saves, in whole steps if those are known.

    Detection, restart and lag scale the effective time by factors that no interval changes. What
    is left, interval / (exp(r c) - 1), rises to one maximum, where log(1 - x) + x + r save = 0
    for x = r interval, and falls. A save must be over before the next.
    """
    rate = failure_rate(settings, nodes=nodes)
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        if math.log1p(-middle) + middle + rate * settings.save_seconds > 0:
            low = middle
        else:
            high = middle
    best = max(high / rate, settings.durable_seconds - settings.save_seconds)
    step = settings.step_seconds
    if step is None:
        return best
    fewest = max(1, math.ceil((settings.durable_seconds - settings.save_seconds) / step))
    steps = {max(fewest, math.floor(best / step)), max(fewest, math.ceil(best / step))}
    return max(
        (count * step for count in sorted(steps)),
        key=lambda interval: shares(settings, nodes=nodes, interval=interval).effective,
    )


def longest_restart(settings: SimulateSettings, *, nodes: int, interval: float) -> float | None:
    """Returns the `restart_seconds` that just meet the target; None: even zero doesn't."""
    rate = failure_rate(settings, nodes=nodes)
    now = shares(settings, nodes=nodes, interval=interval).effective
    if now == 0.0:
        return None
    longest = settings.restart_seconds + math.log(now / settings.target) / rate
    return longest if longest >= 0 else None


def _detected(settings: SimulateSettings, rate: float) -> float:
    """Returns the chance that a failure is detected before the next one."""
    share = settings.hang_share
    return (1 - share) * math.exp(-rate * settings.detect_seconds) + share * math.exp(
        -rate * settings.hang_detect_seconds
    )
