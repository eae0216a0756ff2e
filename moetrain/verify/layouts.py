"""Which layouts are compared: all pairs of degrees, and the ways to cut and recompute a batch."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from moetrain.checks import ConfigError
from moetrain.config import resolve
from moetrain.parallel import degree_choices, divisors
from moetrain.settings import Config, Resolved

EXCHANGES: Mapping[str, dict[str, Any]] = {
    "each": {"send_once": False, "num_rounds": 1},
    "2 rounds": {"num_rounds": 2},
    # Any imbalance is more than one fair share: the rounds are recomputed.
    "recomputed": {"num_rounds": 1, "max_load": 1.0},
}
"""Ways of the token exchange that most settings never take: each assignment by itself, rounds in
flight while others compute, and rounds that the backward pass sends and computes again."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to share out a global batch; `num_micro_batches` are a rank's, one after another."""

    num_ranks: int = 1
    expert_degree: int = 1
    data_replicate_degree: int = 1
    num_micro_batches: int = 1
    recompute: str = "none"
    exchange: str | None = None
    """How assignments travel, a key of `EXCHANGES`; None: as the settings say."""

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
        if self.exchange is not None:
            parts.append(f"exchange {self.exchange}")
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
            exchange=replace(config.parallel.exchange, **EXCHANGES.get(self.exchange or "", {})),
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
    possible, impossible = those_possible(config, _wanted(config, num_ranks=num_ranks))
    return [REFERENCE, *possible], impossible


def those_possible(
    config: Config, wanted: Iterable[Layout]
) -> tuple[list[Layout], list[tuple[Layout, ConfigError]]]:
    """Returns the layouts that a configuration can have, and the others with the reason."""
    possible, impossible = [], []
    for layout in wanted:
        try:
            layout.of(config)
        except ConfigError as error:
            impossible.append((layout, error))
        else:
            possible.append(layout)
    return possible, impossible


def _wanted(config: Config, *, num_ranks: int) -> Iterator[Layout]:
    yield Layout(num_micro_batches=_cuts(config.train.global_batch_size))
    yield Layout(recompute="full")
    for world in _worlds(num_ranks):
        for replicate, expert in degree_choices(world):
            if expert == 1 or config.model.is_moe:  # a dense model has nothing to spread
                yield Layout(num_ranks=world, expert_degree=expert, data_replicate_degree=replicate)
    if worlds := _worlds(num_ranks):
        if config.model.is_moe:
            pair = worlds[0]
            for exchange in EXCHANGES:
                yield Layout(num_ranks=pair, expert_degree=pair, exchange=exchange)
        yield all_at_once(config, num_ranks=num_ranks)


def all_at_once(config: Config, *, num_ranks: int) -> Layout:
    """Returns the layout with everything in it: sharded experts, micro-batches, recomputation."""
    sequences, experts = config.train.global_batch_size, config.model.num_experts
    world = max(_worlds(num_ranks), default=1)
    # Half of the ranks an expert axis, so that experts are sharded as well.
    wide = [e for e in divisors(world) if experts % e == 0 and e < world]
    return Layout(
        num_ranks=world,
        expert_degree=wide[-1] if wide else 1,
        num_micro_batches=_cuts(sequences // world),
        recompute="full",
    )


def _cuts(sequences: int) -> int:
    """Returns into how many micro-batches so many sequences are cut: 4, 3, or else 2."""
    return next((d for d in (4, 3) if sequences % d == 0), 2)


def _worlds(num_ranks: int) -> list[int]:
    powers = {2**k for k in range(1, num_ranks.bit_length()) if 2**k <= num_ranks}
    return sorted(powers | ({num_ranks} if num_ranks > 1 else set()))


def as_plain(layout: Layout) -> dict[str, int | str | None]:
    """Returns a layout's degrees by name."""
    return dataclasses.asdict(layout) | {"data_shard_degree": layout.data_shard_degree}
