"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from moetrain.settings import ScheduleSettings


def learning_rate(step: int, *, peak: float, num_steps: int, settings: ScheduleSettings) -> float:
    """Returns the learning rate of optimizer step `step` (the first is 0) of `num_steps`.

    A linear warm-up over `warmup_steps`; then `cosine` falls to `final_lr_ratio` of the peak,
    `wsd` stays and falls linearly over the last `decay_fraction` of the run, `constant` stays.
    The last step of a schedule that falls has exactly `final_lr_ratio` of the peak. With
    `restart_from` all of it is counted from that step.
    """
    begin = settings.restart_from or 0
    step, num_steps = step - begin, num_steps - begin
    warmup, left = settings.warmup_steps, max(0, num_steps - 1 - step)
    if step < warmup:
        return peak * (step + 1) / warmup
    final = settings.final_lr_ratio
    if settings.name == "cosine":
        progress = (step - warmup) / (num_steps - warmup) if left else 1.0
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
    if settings.name == "wsd" and (decay := decay_steps(num_steps, settings=settings)):
        return peak * (final + (1 - final) * min(1.0, left / decay))
    return peak


def decay_steps(num_steps: int, *, settings: ScheduleSettings) -> int:
    """Returns in how many of `num_steps` wsd's rate is below its peak: the last ones."""
    return max(1, round(num_steps * settings.decay_fraction)) if settings.decay_fraction else 0
