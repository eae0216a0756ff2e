"""Optimizers and learning-rate schedules."""

from moetrain.optim.optimizer import allocate_state, build_optimizer
from moetrain.optim.schedule import learning_rate
from moetrain.optim.settings import OptimSettings, ScheduleSettings

__all__ = [
    "OptimSettings",
    "ScheduleSettings",
    "allocate_state",
    "build_optimizer",
    "learning_rate",
]
