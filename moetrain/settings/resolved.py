"""A configuration in which everything is decided; it is saved as a run's `config.yaml`.

Each part is a subclass of the part of the tree, with the types of open settings narrowed, so that a
resolved configuration is accepted wherever an unresolved one is. `moetrain.config.resolve` makes
it.
"""

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from data_pipeline.settings import DataSettings
from moetrain.checks import one_of
from moetrain.settings.launch import ClusterSettings, LaunchSettings
from moetrain.settings.parallel import EVERY, ParallelSettings
from moetrain.settings.train import FolderName, RunSettings, TrainSettings
from moetrain.settings.tree import Config

# `field()` removes the default that a narrowed setting would inherit.


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ResolvedRun(RunSettings):
    """A run with its name; `dir` is absolute, because ranks may run elsewhere."""

    name: FolderName = field()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ResolvedTrain(TrainSettings):
    """The training loop with its number of steps and its micro-batch size."""

    num_steps: PositiveInt = field()
    micro_batch_size: PositiveInt = field()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ResolvedParallel(ParallelSettings):
    """A layout: its degrees multiply to the number of ranks; nothing in it is `auto`."""

    expert_degree: PositiveInt = field()
    data_shard_degree: PositiveInt = field()
    gather_weights: Annotated[str, AfterValidator(one_of(*EVERY))] = "micro_batch"
    reduce_gradients: Annotated[str, AfterValidator(one_of(*EVERY))] = "micro_batch"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ResolvedData(DataSettings):
    """The data with its folder of shards: an absolute path or a URL, which may not exist yet."""

    dir: str = field()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ResolvedLaunch(LaunchSettings):
    """The launch with its number of ranks."""

    num_workers: PositiveInt = field()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ResolvedCluster(ClusterSettings):
    """The machines with their number of GPUs."""

    gpus_per_node: PositiveInt = field()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Resolved(Config):
    """A whole configuration with nothing left open."""

    train: ResolvedTrain
    run: ResolvedRun = field()
    parallel: ResolvedParallel = field()
    data: ResolvedData = field()
    launch: ResolvedLaunch = field()
    cluster: ResolvedCluster = field()

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return Path(self.run.dir, self.run.name)

    @property
    def num_ranks(self) -> int:
        """All ranks of the run."""
        return self.launch.num_workers
