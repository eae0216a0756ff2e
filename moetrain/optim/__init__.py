"""Optimizers and learning-rate schedules."""

from moetrain.optim.muon import moved_by
from moetrain.optim.optimizer import (
    allocate_state,
    build_optimizer,
    group_settings,
    set_learning_rate,
    state_names,
    state_size,
)
from moetrain.optim.schedule import decay_steps, learning_rate

__all__ = [
    "allocate_state",
    "build_optimizer",
    "decay_steps",
    "group_settings",
    "learning_rate",
    "moved_by",
    "set_learning_rate",
    "state_names",
    "state_size",
]
