"""The tree of settings: typed, frozen dataclasses, without the rules between them.

It is at the bottom of the package: everything may import it. Rules between settings are in
`moetrain.config`. Types are strings, numbers and lists only, because OmegaConf builds its schema
from these classes; choices are validators. `data.*` belongs to the data pipeline.
"""

from moetrain.settings.checkpoint import CheckpointSettings
from moetrain.settings.launch import ClusterSettings, LaunchSettings
from moetrain.settings.match import MatchSettings
from moetrain.settings.model import (
    BACKENDS,
    ExpertsSettings,
    InitSettings,
    ModelSettings,
    RopeScalingSettings,
    RouterSettings,
)
from moetrain.settings.observe import ObserveSettings, WandbSettings
from moetrain.settings.optim import (
    GroupSettings,
    GroupsSettings,
    OptimSettings,
    ScheduleSettings,
)
from moetrain.settings.parallel import ExchangeSettings, ParallelSettings
from moetrain.settings.resolved import (
    Resolved,
    ResolvedCluster,
    ResolvedData,
    ResolvedLaunch,
    ResolvedParallel,
    ResolvedRun,
    ResolvedTrain,
)
from moetrain.settings.train import RunSettings, TrainSettings
from moetrain.settings.tree import Config

__all__ = [
    "BACKENDS",
    "CheckpointSettings",
    "ClusterSettings",
    "Config",
    "ExchangeSettings",
    "ExpertsSettings",
    "GroupSettings",
    "GroupsSettings",
    "InitSettings",
    "LaunchSettings",
    "MatchSettings",
    "ModelSettings",
    "ObserveSettings",
    "OptimSettings",
    "ParallelSettings",
    "Resolved",
    "ResolvedCluster",
    "ResolvedData",
    "ResolvedLaunch",
    "ResolvedParallel",
    "ResolvedRun",
    "ResolvedTrain",
    "RopeScalingSettings",
    "RouterSettings",
    "RunSettings",
    "ScheduleSettings",
    "TrainSettings",
    "WandbSettings",
]
