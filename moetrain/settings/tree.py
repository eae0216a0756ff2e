"""The whole tree of settings of `python -m moetrain`."""

from dataclasses import field
from typing import Any

from pydantic import ConfigDict, NonNegativeInt
from pydantic.dataclasses import dataclass

from data_pipeline.settings import DataSettings
from moetrain.settings.checkpoint import CheckpointSettings
from moetrain.settings.launch import ClusterSettings, LaunchSettings
from moetrain.settings.match import MatchSettings
from moetrain.settings.model import ModelSettings
from moetrain.settings.observe import ObserveSettings
from moetrain.settings.optim import OptimSettings, ScheduleSettings
from moetrain.settings.parallel import ParallelSettings
from moetrain.settings.train import RunSettings, TrainSettings

UNITS = (
    ("train.num_steps", "train.num_tokens", "train.flops"),
    ("schedule.warmup_steps", "schedule.warmup_tokens", "schedule.warmup_fraction"),
)
"""Settings of which one is in force: that of the command line, else one that isn't in steps."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Config:
    """A configuration as it was given: settings that are None are still open."""

    model: ModelSettings
    train: TrainSettings
    seed: NonNegativeInt = 0
    dry_run: bool = False
    """Whether to only check everything and print what would be trained, without writing."""
    extensions: list[str] = field(default_factory=list)
    """The user's own modules, imported before the settings are checked (docs/extending.md)."""
    arm: str | None = None
    """The arm of a comparison that this is: one of `arms`, whose settings replace the files'."""
    arms: dict[str, Any] = field(default_factory=dict)
    """The arms of a comparison by name, each with the settings in which it differs, as in a file or
    by their paths (`model.top_k: 1`). Not part of a run's configuration, which has its arm's."""
    match: MatchSettings = MatchSettings()
    run: RunSettings = RunSettings()
    optim: OptimSettings = OptimSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings = DataSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    observe: ObserveSettings = ObserveSettings()
    launch: LaunchSettings = LaunchSettings()
    cluster: ClusterSettings = ClusterSettings()
