"""Which layouts are compared: all pairs of degrees, and the ways to cut and recompute a batch."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime

from moetrain.checks import ConfigError
from moetrain.config import resolve
from moetrain.parallel import degree_choices, divisors
from moetrain.settings import Config, Resolved


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to share out a global batch; `num_micro_batches` are a rank's, one after another."""

    num_ranks: int = 1
    expert_degree: int = 1
    data_replicate_degree: int = 1
    num_micro_batches: int = 1
    recompute: str = "none"

    @property
    def data_shard_degree(self) -> int:
        """Ranks over which one copy of the dense weights is sharded."""
        return self.num_ranks // self.data_replicate_degree

    def __str__(self) -> str:
        ranks = f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}"
        parts = [
            f"expert {self.expert_degree}",
            f"shard {self.data_shard_degree}",
            f"replicate {self.data_replicate_degree}",
        ]
        if self.num_micro_batches > 1:
            parts.append(f"{self.num_micro_batches} micro-batches")
        if self.recompute != "none":
            parts.append("recomputation")
        return f"{ranks}: {', '.join(parts)}"

    def of(self, config: Config) -> Resolved:
        """Returns the configuration resolved in this layout; ConfigError where there is none."""
        if config.train.global_batch_size % (self.num_ranks * self.num_micro_batches):
            raise ConfigError(
                "train.global_batch_size",
                config.train.global_batch_size,
                f"does not divide into {self.num_ranks * self.num_micro_batches} micro-batches",
            )
        share = config.train.global_batch_size // self.num_ranks
        parallel = replace(
            config.parallel,
            expert_degree=self.expert_degree,
            data_shard_degree=self.data_shard_degree,
            data_replicate_degree=self.data_replicate_degree,
            recompute=self.recompute,
        )
        train = replace(config.train, micro_batch_size=share // self.num_micro_batches)
        return resolve(
            replace(config, parallel=parallel, train=train),
            num_workers=self.num_ranks,
            now=datetime.now(),
        )


REFERENCE = Layout()


def layouts_for(
    config: Config, *, num_ranks: int
) -> tuple[list[Layout], list[tuple[Layout, ConfigError]]]:
    """Returns the layouts of up to so many ranks to compare, and those that can't be, with why.

    The first is the reference. Raises ConfigError where even that can't be.
    """
    REFERENCE.of(config)
    possible, impossible = [REFERENCE], []
    for layout in _wanted(config, num_ranks=num_ranks):
        try:
            layout.of(config)
        except ConfigError as error:
            impossible.append((layout, error))
        else:
            possible.append(layout)
    return possible, impossible


def _wanted(config: Config, *, num_ranks: int) -> Iterator[Layout]:
    sequences, experts = config.train.global_batch_size, config.model.num_experts
    yield Layout(num_micro_batches=_cuts(sequences))
    yield Layout(recompute="full")
    for world in _worlds(num_ranks):
        for replicate, expert in degree_choices(world):
            if expert == 1 or config.model.is_moe:  # a dense model has nothing to spread
                yield Layout(num_ranks=world, expert_degree=expert, data_replicate_degree=replicate)
    if worlds := _worlds(num_ranks):
        # All at once. Half of the ranks an expert axis, so that experts are sharded as well.
        world = worlds[-1]
        wide = [e for e in divisors(world) if experts % e == 0 and e < world]
        yield Layout(
            num_ranks=world,
            expert_degree=wide[-1],
            num_micro_batches=_cuts(sequences // world),
            recompute="full",
        )


def _cuts(sequences: int) -> int:
    """Returns into how many micro-batches so many sequences are cut: 4, 3, or else 2."""
    return next((d for d in (4, 3) if sequences % d == 0), 2)


def _worlds(num_ranks: int) -> list[int]:
    powers = {2**k for k in range(1, num_ranks.bit_length()) if 2**k <= num_ranks}
    return sorted(powers | ({num_ranks} if num_ranks > 1 else set()))


def as_plain(layout: Layout) -> dict[str, int | str]:
    """Returns a layout's degrees by name."""
    return dataclasses.asdict(layout) | {"data_shard_degree": layout.data_shard_degree}
