"""A configuration in which everything is decided: what is saved as a run's `config.yaml`.

Each part is the part of the tree with its open settings narrowed, so that a resolved configuration
passes wherever one as given does. `moetrain.config.resolve` makes it.
"""

from dataclasses import field
from pathlib import Path

from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from data_pipeline.settings import DataSettings
from moetrain.settings.launch import LaunchSettings
from moetrain.settings.parallel import ParallelSettings
from moetrain.settings.train import FolderName, RunSettings, TrainSettings
from moetrain.settings.tree import Config

# `field()` takes back the default that a narrowed setting would inherit.


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ResolvedRun(RunSettings):
    """A run with its name; `dir` is absolute, because ranks may run elsewhere."""

    name: FolderName = field()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ResolvedTrain(TrainSettings):
    """The training loop with the sequences that a rank takes at once."""

    micro_batch_size: PositiveInt = field()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ResolvedParallel(ParallelSettings):
    """A layout: its degrees multiply to the number of ranks."""

    expert_degree: PositiveInt = field()
    data_shard_degree: PositiveInt = field()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ResolvedData(DataSettings):
    """The data with its folder of shards, absolute or a URL, there or not."""

    dir: str = field()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ResolvedLaunch(LaunchSettings):
    """The launch with its number of ranks."""

    num_workers: PositiveInt = field()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Resolved(Config):
    """Everything that a run is made from, with nothing open."""

    train: ResolvedTrain
    run: ResolvedRun = field()
    parallel: ResolvedParallel = field()
    data: ResolvedData = field()
    launch: ResolvedLaunch = field()

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return Path(self.run.dir, self.run.name)

    @property
    def num_ranks(self) -> int:
        """All ranks of the run."""
        return self.launch.num_workers
