"""The learning rate as a pure function of the step: there is no state to save or restore."""

import math
from collections.abc import Callable
from typing import Any

from moetrain.registries import SCHEDULES
from moetrain.settings import ScheduleSettings

Schedule = Callable[[int, int, ScheduleSettings, Any], float]
"""The share of `optim.lr` at a step after the warm-up: (step, number of steps, settings, options).

Both are counted from where the schedule begins, the warm-up included; the first step is 0.
"""


def learning_rate(step: int, *, peak: float, num_steps: int, settings: ScheduleSettings) -> float:
    """Returns the learning rate of optimizer step `step` (the first is 0) of `num_steps`.

    A linear warm-up over `warmup_steps`, then the schedule. With `restart_from`, both are counted
    from that step.
    """
    begin = settings.restart_from or 0
    step, num_steps = step - begin, num_steps - begin
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    share: Schedule = SCHEDULES.get(settings.name).made
    options = SCHEDULES.typed_options(settings.name, settings.options)
    return peak * share(step, num_steps, settings, options)


@SCHEDULES.register("cosine")
def cosine(step: int, num_steps: int, settings: ScheduleSettings, options: None) -> float:
    """Decays to exactly `final_lr_ratio` at the last step, along half a cosine."""
    warmup, final = settings.warmup_steps, settings.final_lr_ratio
    left = max(0, num_steps - 1 - step)
    progress = (step - warmup) / (num_steps - warmup) if left else 1.0
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


@SCHEDULES.register("wsd")
def wsd(step: int, num_steps: int, settings: ScheduleSettings, options: None) -> float:
    """Stays constant, then decays linearly over the last `decay_fraction` (arXiv 2404.06395)."""
    decay, final = decay_steps(num_steps, settings=settings), settings.final_lr_ratio
    left = max(0, num_steps - 1 - step)
    return final + (1 - final) * min(1.0, left / decay) if decay else 1.0


@SCHEDULES.register("constant")
def constant(step: int, num_steps: int, settings: ScheduleSettings, options: None) -> float:
    """Stays constant."""
    return 1.0


def decay_steps(num_steps: int, *, settings: ScheduleSettings) -> int:
    """Returns the number of wsd's decay steps: the last of `num_steps`, with a rate below peak."""
    return max(1, round(num_steps * settings.decay_fraction)) if settings.decay_fraction else 0
