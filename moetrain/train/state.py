"""The state in a checkpoint: counters as JSON, tensors by their global names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from moetrain.model import Transformer
from moetrain.parallel import plain_name
from moetrain.train.means import RunningMeans


@dataclass
class TrainState:
    """A run's counters. The learning rate and the data order follow from them."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    samples: int = 0
    """Global sample index at which the next batch begins."""
    tokens: int = 0
    """Tokens trained on."""
    flops: float | None = None
    """FLOPs of all steps' forward and backward passes, padding included and recomputation not;
    None: not counted yet."""
    skipped: int = 0
    """Steps whose loss or gradients were not finite."""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """The time of all attempts up to this checkpoint; counted where `train.max_seconds` is set."""
    data: str = ""
    """The fingerprint of the shards that `samples` counts in."""
    tokenizer: str = ""
    """The fingerprint of the tokenizer that made them."""
    position: dict[str, Any] = field(default_factory=dict)
    """The state of the mixture of sources at `samples`, in the data pipeline's format."""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens trained on, by source."""
    corrupt_sequences: int = 0
    """Sequences that were skipped because of corrupted documents."""
    imported_dtype: str | None = None
    """The dtype of the weights that the run began with, if they were imported."""
    imported_token_ids: dict[str, Any] = field(default_factory=dict)
    """The special tokens in an imported model's config.json, by their names there."""
    branched_from: dict[str, Any] = field(default_factory=dict)
    """Run, step and attempt that the run was branched from; empty if it wasn't."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """The changed settings at each resume: the step, and the values before and after by name."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """The state of extensions' callbacks, by their names."""
    since_record: RunningMeans = field(default_factory=RunningMeans)
    """Means over the steps since the last record, for the next record, also after a resume."""

    @classmethod
    def restored(cls, counters: Mapping[str, Any]) -> "TrainState":
        """Returns the state of `as_json`; counters that are missing have their defaults."""
        means = RunningMeans(**counters.get("since_record", {}))
        return cls(**{**counters, "since_record": means})

    def count_sequences(self, number: int, *, flops: float) -> None:
        """Counts a step's sequences, of so many FLOPs each."""
        if self.flops is None:  # the checkpoint is of a version that didn't count them
            self.flops = self.samples * flops
        self.samples += number
        self.flops += number * flops

    def as_json(self) -> dict[str, Any]:
        """Returns the counters by name."""
        return asdict(self)


def checkpoint_tensors(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns parameters, buffers and optimizer state under their layout-independent names.

    The tensors are the live ones: loading into them restores model and optimizer.
    """
    named = {f"model.{plain_name(n)}": b for n, b in model.named_buffers()}
    ours = {p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        assert parameter in ours or not parameter.requires_grad, (
            f"{name} is gathered: its optimizer state would be left out"
        )
        named[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                named[f"optimizer.{name}.{key}"] = value
    return named
