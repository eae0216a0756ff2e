"""Which settings of two configurations differ, and what each difference means for a run.

Pure: it takes plain configurations (`as_plain`, a manifest's `config`) and decides nothing. Leaves
to `resume` what is refused at a resume and what is reported.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import Any

from data_pipeline import DataSettings
from data_pipeline.commands.shell import as_typed
from moetrain.redaction import redacted
from moetrain.settings import Config, ModelSettings, OptimSettings, ScheduleSettings, TrainSettings


class Kind(StrEnum):
    """What a setting decides."""

    function = "function"
    """What the weights compute: with another value the same weights are another model."""
    order = "order"
    """Which text a sample index means: with another value some text would be read twice."""
    text = "text"
    """Where the text is. The shards' fingerprints tell whether it is the same text."""
    recipe = "recipe"
    """How the weights are trained, and what the metrics mean."""
    layout = "layout"
    """Which rank computes what, and how: the same numbers up to rounding."""
    incidental = "incidental"
    """Nothing about the training: where the run is kept, what is shown, how it is started."""


# The longest matching prefix counts. A new setting of the model changes its function unless it is
# listed here; a new setting of anything else is part of the recipe.
_KINDS = {
    "": Kind.recipe,
    "model": Kind.function,
    "model.max_seq_len": Kind.recipe,
    "model.pad_vocab_to_multiple_of": Kind.incidental,  # its effect is in vocab_size
    "model.loss_chunk_size": Kind.layout,
    "model.attention_kernel": Kind.layout,
    "model.init": Kind.recipe,
    "model.head_z_loss_weight": Kind.recipe,
    "model.router.load_balance_loss_weight": Kind.recipe,
    "model.router.load_balance_scope": Kind.recipe,
    "model.router.z_loss_weight": Kind.recipe,
    "model.router.bias_update_rate": Kind.recipe,
    "model.router.jitter_noise": Kind.recipe,
    "model.experts.backend": Kind.layout,
    "model.experts.recompute": Kind.layout,
    "seed": Kind.order,
    "extensions": Kind.incidental,  # what they register is named where it is used
    "arm": Kind.incidental,  # its settings are in their places
    "arms": Kind.incidental,
    "match": Kind.incidental,  # its effect is in the setting that it works out
    "train.num_tokens": Kind.incidental,  # its effect is in num_steps, as that of flops
    "train.flops": Kind.incidental,
    "train.seq_len": Kind.order,
    "train.micro_batch_size": Kind.layout,
    "train.deterministic": Kind.layout,
    "train.validate_every_steps": Kind.incidental,
    "train.validate_at_start": Kind.incidental,
    "train.max_skipped_steps": Kind.incidental,
    "schedule.warmup_tokens": Kind.incidental,  # in warmup_steps
    "schedule.warmup_fraction": Kind.incidental,
    "data.dir": Kind.text,
    "data.corpus": Kind.text,
    "data.text_field": Kind.text,
    "data.tokenizer": Kind.text,
    "data.packing": Kind.order,
    "data.shuffle_window": Kind.order,
    "data.max_epochs": Kind.incidental,
    "data.on_changed": Kind.incidental,
    "data.num_workers": Kind.incidental,
    "data.prefetch_batches": Kind.incidental,
    "data.cache": Kind.incidental,
    "parallel": Kind.layout,
    "run": Kind.incidental,
    "run.device": Kind.layout,
    "run.threads_per_rank": Kind.layout,
    "checkpoint": Kind.incidental,
    "observe": Kind.incidental,
    "launch": Kind.incidental,
    "launch.num_workers": Kind.layout,
    "cluster": Kind.incidental,
}

# The parts of the configuration in which a missing setting had its default.
_TREES: dict[str, type] = {
    "model": ModelSettings,
    "train": TrainSettings,
    "optim": OptimSettings,
    "schedule": ScheduleSettings,
    "data": DataSettings,
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that has another value than before."""

    name: str
    """As on a command line: `model.router.z_loss_weight`."""
    before: Any
    now: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.name} {as_typed_value(self.before)} → {as_typed_value(self.now)}"


def as_plain(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dictionaries of JSON values, without its secrets.

    Secrets aren't restored from a saved configuration: the same command passes them again. The dry
    run's setting isn't part of a run's configuration, nor are the other arms of its comparison.
    """
    plain: dict[str, Any] = redacted(json.loads(json.dumps(asdict(config))))
    for name in ("dry_run", "arms"):
        plain.pop(name, None)
    plain["match"].pop("outcome")
    return plain


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Returns the settings in which two plain configurations differ, in the order of `now`.

    A setting that one of them lacks has its default: the configuration may be of an older version.
    """
    ours, theirs = dict(leaves(now)), dict(leaves(before))
    known = default_settings()
    found = []
    for name in dict.fromkeys([*ours, *theirs]):
        left, right = (leaves.get(name, known.get(name)) for leaves in (theirs, ours))
        if left != right:
            found.append(Change(name=name, before=left, now=right, kind=kind_of(name)))
    return found


@cache
def default_settings() -> Mapping[str, Any]:
    """Returns what a setting was where a plain configuration lacks it, by name."""
    known = {k: v for path, tree in _TREES.items() for k, v in _defaults(path, tree)}
    return MappingProxyType({"seed": 0} | known)


def kind_of(name: str) -> Kind:
    """Returns what a setting decides."""
    while name not in _KINDS:
        name = name.rpartition(".")[0]
    return _KINDS[name]


def function_settings() -> list[str]:
    """Returns the settings that decide what the weights compute."""
    names = (name for name, _ in _fields("model", ModelSettings))
    return [name for name in names if kind_of(name) is Kind.function]


def as_typed_value(value: Any) -> str:
    """Returns a value in command-line syntax."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_typed_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(as_typed_value, value))}]"
    return as_typed(value) if isinstance(value, str) else json.dumps(value)


def leaves(plain: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each setting of a plain configuration by its name, with its value."""
    for key, value in plain.items():
        name = f"{path}.{key}".lstrip(".")
        if isinstance(value, Mapping):
            yield from leaves(value, name)
        else:
            yield name, value


def _defaults(path: str, tree: type) -> Iterator[tuple[str, Any]]:
    """Yields the defaults of a part of the configuration, as JSON values."""
    for name, field in _fields(path, tree):
        if field.default is not MISSING:
            yield name, json.loads(json.dumps(field.default))
        elif field.default_factory is list:
            yield name, []


def _fields(path: str, tree: Any) -> Iterator[tuple[str, Field[Any]]]:
    for field in fields(tree):
        name = f"{path}.{field.name}"
        if is_dataclass(field.type):
            yield from _fields(name, field.type)
        else:
            yield name, field
