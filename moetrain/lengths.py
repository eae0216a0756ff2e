"""A run's length and its warm-up in optimizer steps, whatever the unit they were given in.

Pure. Where settings are composed (`composing`) a command line's unit takes the place of the files';
here a unit other than steps takes the place of steps.
"""

import math
from dataclasses import replace
from typing import TypeVar

from moetrain.checks import ConfigError
from moetrain.model.cost import training_flops_per_token
from moetrain.settings import Config
from moetrain.settings.tree import UNITS

C = TypeVar("C", bound=Config)


def in_steps(config: C) -> C:
    """Returns a configuration whose length and warm-up are in steps; one that has them, unchanged.

    At least the tokens or FLOPs asked for, so rounded up to whole steps. Raises ConfigError where
    two units are given, or none.
    """
    train, schedule = config.train, config.schedule
    positions = train.global_batch_size * train.seq_len
    num_steps = train.num_steps
    for _, *others in UNITS:
        _require_one(config, *others)
    if train.num_tokens is not None:
        num_steps = math.ceil(train.num_tokens / positions)
    elif train.flops is not None:
        num_steps = math.ceil(train.flops / (flops_per_token(config) * positions))
    if num_steps is None:
        raise ConfigError(
            "train.num_steps",
            "(missing)",
            "must be given, or train.num_tokens or train.flops in its place",
        )
    warmup = schedule.warmup_steps
    if schedule.warmup_tokens is not None:
        warmup = math.ceil(schedule.warmup_tokens / positions)
    elif schedule.warmup_fraction is not None:
        warmup = round(schedule.warmup_fraction * (num_steps - (schedule.restart_from or 0)))
    return replace(
        config,
        train=replace(train, num_steps=num_steps),
        schedule=replace(schedule, warmup_steps=max(0, warmup)),
    )


def steps_of(config: Config) -> int:
    """Returns the number of steps of a configuration that has been through `in_steps`."""
    assert config.train.num_steps is not None, "in_steps sets it"
    return config.train.num_steps


def flops_per_token(config: Config) -> float:
    """Returns the FLOPs of one token of a configuration's training."""
    return training_flops_per_token(config.model, seq_len=config.train.seq_len)


def _require_one(config: Config, one: str, other: str) -> None:
    group, _, first = one.partition(".")
    second = other.partition(".")[2]
    values = [getattr(getattr(config, group), name) for name in (first, second)]
    if None not in values:
        raise ConfigError(one, values[0], f"can't hold beside {other}={values[1]}: leave one out")
