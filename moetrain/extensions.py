"""What a user's own module imports to extend moetrain: decorators and base classes.

A module registers things by name, and settings name them: docs/extending.md has an example of each
kind. Built-in ones are registered in the same way.
"""

from collections.abc import Callable

from data_pipeline.corpora.data_source import DATA_SOURCES, DataSource
from data_pipeline.tokenizers.tokenizer import TOKENIZERS, Tokenizer
from moetrain.kernels import ExpertFunction
from moetrain.model import Choice, LossSums, Transformer
from moetrain.model.router import Router
from moetrain.observe import Sink
from moetrain.optim.optimizer import Groups, OptimizerBuilder
from moetrain.optim.schedule import Schedule
from moetrain.parallel import TOKEN_AXES, Meshes
from moetrain.registries import (
    CALLBACKS,
    EXPERT_FUNCTIONS,
    METRICS,
    OBJECTIVES,
    OPTIMIZERS,
    ROUTERS,
    SCHEDULES,
    SINKS,
)
from moetrain.settings import OptimSettings, ScheduleSettings
from moetrain.train.control import Outcome
from moetrain.train.micro_batch import MicroBatch
from moetrain.train.objective import Loss, Objective, Pretraining
from moetrain.train.step_report import Metric, StepReport
from moetrain.train.trainer import Callback, Trainer

__all__ = [
    "TOKEN_AXES",
    "Callback",
    "Choice",
    "DataSource",
    "ExpertFunction",
    "Groups",
    "Loss",
    "LossSums",
    "Meshes",
    "Metric",
    "MicroBatch",
    "Objective",
    "OptimSettings",
    "OptimizerBuilder",
    "Outcome",
    "Pretraining",
    "Router",
    "Schedule",
    "ScheduleSettings",
    "Sink",
    "StepReport",
    "Tokenizer",
    "Trainer",
    "Transformer",
    "register_callback",
    "register_data_source",
    "register_expert_function",
    "register_metric",
    "register_objective",
    "register_optimizer",
    "register_router",
    "register_schedule",
    "register_sink",
    "register_tokenizer",
]


def register_router(
    name: str, *, options: type | None = None
) -> Callable[[type[Router]], type[Router]]:
    """Returns the decorator of a `Router` that `model.router.name` may name.

    `options` is a dataclass of the settings that `model.router.options` may have. Raises
    ValueError for a name that is taken; so do the others.
    """
    return ROUTERS.register(name, options=options)


def register_expert_function(
    name: str, *, options: type | None = None
) -> Callable[[type[ExpertFunction]], type[ExpertFunction]]:
    """Returns the decorator of an `ExpertFunction` that `model.experts.function` may name."""
    return EXPERT_FUNCTIONS.register(name, options=options)


def register_optimizer(
    name: str, *, options: type | None = None
) -> Callable[[OptimizerBuilder], OptimizerBuilder]:
    """Returns the decorator of a function that makes the optimizer that `optim.name` names."""
    return OPTIMIZERS.register(name, options=options)


def register_schedule(name: str, *, options: type | None = None) -> Callable[[Schedule], Schedule]:
    """Returns the decorator of a function of the step that `schedule.name` may name."""
    return SCHEDULES.register(name, options=options)


def register_objective(
    name: str, *, options: type | None = None
) -> Callable[[type[Objective]], type[Objective]]:
    """Returns the decorator of an `Objective` that `train.objective` may name."""
    return OBJECTIVES.register(name, options=options)


def register_callback(
    name: str, *, options: type | None = None
) -> Callable[[type[Callback]], type[Callback]]:
    """Returns the decorator of a `Callback` that `train.callbacks` may have."""
    return CALLBACKS.register(name, options=options)


def register_metric(
    name: str, *, options: type | None = None
) -> Callable[[type[Metric]], type[Metric]]:
    """Returns the decorator of a `Metric` that `observe.metrics` may have."""
    return METRICS.register(name, options=options)


def register_sink(name: str, *, options: type | None = None) -> Callable[[type[Sink]], type[Sink]]:
    """Returns the decorator of a `Sink` that `observe.sinks` may have.

    It is made as `MySink(options, run_dir=Path, config=dict, resume_step=int | None)` on one rank.
    """
    return SINKS.register(name, options=options)


def register_tokenizer(name: str) -> Callable[[Callable[[], Tokenizer]], Callable[[], Tokenizer]]:
    """Returns the decorator of what makes the tokenizer that `tokenizer` names.

    Its `name` must be the name that it is registered by.
    """
    return TOKENIZERS.register(name)


def register_data_source(
    name: str, *, options: type | None = None
) -> Callable[[type[DataSource]], type[DataSource]]:
    """Returns the decorator of a `DataSource` that `corpus` or `data.corpus` may name."""
    return DATA_SOURCES.register(name, options=options)
