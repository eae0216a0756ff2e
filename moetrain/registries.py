"""The registries of the kinds of things that an experiment can replace, by name.

Below the settings, which are checked against the names here; what is registered is described by
`moetrain.extensions`, which is what a module of a user's own imports.
"""

from typing import Any

from data_pipeline.extensions import Registry as Registry

ROUTERS = Registry[Any](
    "router", setting="model.router.name", built_in={"top_k": "moetrain.model.router"}
)
EXPERT_FUNCTIONS = Registry[Any](
    "expert function",
    setting="model.experts.function",
    built_in={"swiglu": "moetrain.kernels.expert_function"},
)
OPTIMIZERS = Registry[Any](
    "optimizer",
    setting="optim.name",
    built_in=dict.fromkeys(("adamw", "sgd"), "moetrain.optim.optimizer")
    | {"lion": "moetrain.optim.lion", "muon": "moetrain.optim.muon"},
)
SCHEDULES = Registry[Any](
    "schedule",
    setting="schedule.name",
    built_in=dict.fromkeys(("cosine", "wsd", "constant"), "moetrain.optim.schedule"),
)
OBJECTIVES = Registry[Any](
    "objective",
    setting="train.objective",
    built_in={"pretraining": "moetrain.train.objective"},
)
CALLBACKS = Registry[Any]("callback", setting="train.callbacks", built_in={})
METRICS = Registry[Any]("metric", setting="observe.metrics", built_in={})
SINKS = Registry[Any]("sink", setting="observe.sinks", built_in={})

SELECTED = (
    (ROUTERS, "model.router.name", "model.router.options"),
    (EXPERT_FUNCTIONS, "model.experts.function", "model.experts.options"),
    (OPTIMIZERS, "optim.name", "optim.options"),
    (SCHEDULES, "schedule.name", "schedule.options"),
    (OBJECTIVES, "train.objective", "train.objective_options"),
    (CALLBACKS, "train.callbacks", "train.callback_options"),
    (METRICS, "observe.metrics", "observe.metric_options"),
    (SINKS, "observe.sinks", "observe.sink_options"),
)
"""The setting that names one thing of a kind, or a list of several, and that of the options."""
