"""The rates of a schedule, and the optimizers, written out from their papers."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from moetrain.settings import OptimSettings, ScheduleSettings
from moetrain.verify.reference.weights import Weights


def rate(step: int, *, peak: float, num_steps: int, settings: ScheduleSettings) -> float | None:
    """Returns the learning rate of a step, counted from 0; None for a schedule of an extension."""
    begin = settings.restart_from or 0
    now, last, warmup = step - begin, num_steps - begin - 1, settings.warmup_steps
    if now < warmup:
        return peak * (now + 1) / warmup
    final = settings.final_lr_ratio
    if settings.name == "constant":
        return peak
    if settings.name == "cosine":
        # Half a cosine from the warm-up's end to the last step, where it is `final_lr_ratio`.
        angle = math.pi if now >= last else math.pi * (now - warmup) / (last + 1 - warmup)
        return peak * (final + (1 - final) * (1 + math.cos(angle)) / 2)
    if settings.name == "wsd":
        if not settings.decay_fraction:
            return peak
        decay = max(1, round((last + 1) * settings.decay_fraction))
        return peak * (final + (1 - final) * min(1.0, max(0, last - now) / decay))
    return None


@dataclass
class Optimizer:
    """AdamW (arXiv 1711.05101) or SGD with momentum; only matrices decay."""

    settings: OptimSettings
    num_updates: int = 0
    first: Weights = field(default_factory=dict)
    """AdamW's mean of the gradients, or SGD's momentum buffer."""
    second: Weights = field(default_factory=dict)
    """AdamW's mean of their squares."""

    def step(self, weights: Weights, gradients: Weights, lr: float) -> None:
        """Moves the weights in place."""
        self.num_updates += 1
        for name, weight in weights.items():
            decay = self.settings.weight_decay if weight.ndim > 1 else 0.0
            update = self._adamw if self.settings.name == "adamw" else self._sgd
            moved = update(name, weight, gradients[name], lr=lr, decay=decay)
            weight.copy_(moved)

    def _adamw(self, name: str, w: Tensor, g: Tensor, *, lr: float, decay: float) -> Tensor:
        beta1, beta2 = self.settings.betas
        m = beta1 * self.first.get(name, 0 * g) + (1 - beta1) * g
        v = beta2 * self.second.get(name, 0 * g) + (1 - beta2) * g * g
        self.first[name], self.second[name] = m, v
        m_hat = m / (1 - beta1**self.num_updates)
        v_hat = v / (1 - beta2**self.num_updates)
        return w - lr * decay * w - lr * m_hat / (v_hat.sqrt() + self.settings.eps)

    def _sgd(self, name: str, w: Tensor, g: Tensor, *, lr: float, decay: float) -> Tensor:
        g = g + decay * w
        if momentum := self.settings.momentum:
            g = g + momentum * self.first[name] if name in self.first else g
            self.first[name] = g
        return w - lr * g
