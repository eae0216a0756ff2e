"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from moetrain.optim.settings import ScheduleSettings


def learning_rate(step: int, *, peak: float, num_steps: int, settings: ScheduleSettings) -> float:
    """Returns the learning rate of optimizer step `step` (the first is 0) of `num_steps`.

    A linear warm-up over `warmup_steps`; then `cosine` falls to `final_lr_ratio` of the peak,
    `wsd` stays and falls linearly over the last `decay_fraction` of the run, `constant` stays.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    final = settings.final_lr_ratio
    if settings.name == "cosine":
        progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
    if settings.name == "wsd":
        decay_steps = max(1, round(num_steps * settings.decay_fraction))
        left = max(0, num_steps - step) / decay_steps
        return peak * (final + (1 - final) * min(1.0, left))
    return peak
