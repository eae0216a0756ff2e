"""Facts about a checkpoint from a run's files: text, tokens, losses, loads, where recorded.

Owns reading and joining the checkpoint's counters, metrics.jsonl, events.jsonl and the index of
the shards. Leaves the text to `model_card`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import DataError, OnCorrupt, ShardFolder, without_secrets
from moetrain.checkpoint.manifest import Manifest
from moetrain.kinds import EventKind
from moetrain.observe import (
    baselines_by_source,
    by_source,
    expert_load,
    iterate_metrics,
    read_events,
)
from moetrain.settings import Resolved


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of training text; None where a fact isn't recorded."""

    name: str
    tokens: int
    """Trained on up to the checkpoint."""
    epochs: float | None
    text: str | None
    licence: str | None
    language: str | None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Everything that is known about a checkpoint; unknown facts are empty or None."""

    step: int
    tokens: int
    skipped: int
    corrupt_sequences: int
    mesh: Mapping[str, object]
    origins: tuple[str, ...]
    """Sentences on what the run started from."""
    sources: tuple[Source, ...]
    shards_unknown: str | None
    """Why the shards that the run was trained on could not be read."""
    validation_step: int
    validation_loss: float | None
    validation: Mapping[str, Mapping[str, float]]
    """`loss` and `bits_per_byte` by source."""
    baselines: Mapping[str, Mapping[str, float]]
    router_step: int
    router: Mapping[str, float]
    loads: Mapping[int, list[float]]
    """The share of a layer's tokens of each expert, by layer."""


def read_facts(run_dir: Path, *, manifest: Manifest, config: Resolved) -> RunFacts:
    """Reads the facts about a run up to a checkpoint; missing files are skipped."""
    state = manifest.state
    trained: dict[str, int] = state.get("source_tokens") or {}
    validated, routed, read = _newest_records(run_dir / "metrics.jsonl", step=manifest.step)
    events = read_events(run_dir / "events.jsonl")
    shards, unknown = _shards(config, state.get("data"), wanted=bool(trained))
    described = {source.name: source for source in shards.index.sources} if shards else {}
    corpora = shards.index.build.sources if shards else {}
    sources = tuple(
        Source(
            name=name,
            tokens=tokens,
            epochs=_number(read.get(f"data/{name}/epochs")),
            text=_text(described[name].description, corpora[name].corpus)
            if name in described
            else None,
            licence=described[name].licence if name in described else None,
            language=described[name].language if name in described else None,
        )
        for name, tokens in trained.items()
        if tokens
    )
    figures: dict[str, dict[str, float]] = {}
    for measure in ("loss", "bits_per_byte"):
        for source, value in by_source(dict(_numbers(validated)), measure).items():
            figures.setdefault(source, {})[measure] = value
    loads = expert_load(routed)
    layers = [] if loads is None else loads.tolist()
    return RunFacts(
        step=manifest.step,
        tokens=int(state.get("tokens", 0)),
        skipped=int(state.get("skipped", 0)),
        corrupt_sequences=int(state.get("corrupt_sequences", 0)),
        mesh=manifest.mesh,
        origins=tuple(_origins(events)),
        sources=sources,
        shards_unknown=unknown,
        validation_step=int(validated.get("step", 0)),
        validation_loss=_number(validated.get("validation/loss")),
        validation=figures,
        baselines=baselines_by_source(events),
        router_step=int(routed.get("step", 0)),
        router={
            name.removeprefix("router/"): value
            for name, value in _numbers(routed)
            if name.startswith("router/")
        },
        loads=dict(enumerate(layers, start=config.model.num_dense_layers)),
    )


def _newest_records(
    metrics: Path, *, step: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The newest record up to a step with a validation, with loads, and with what was read."""
    newest: list[dict[str, Any]] = [{}, {}, {}]
    beginnings = ("validation/", "router/", "data/")
    for record in iterate_metrics(metrics):
        at = record.get("step")
        if not isinstance(at, (int, float)) or at > step:
            continue
        for number, beginning in enumerate(beginnings):
            if any(name.startswith(beginning) for name in record):
                newest[number] = record
    return newest[0], newest[1], newest[2]


def _shards(
    config: Resolved, fingerprint: str | None, *, wanted: bool
) -> tuple[ShardFolder | None, str | None]:
    """The shards that a run was trained on, or why there are none to read."""
    location = config.data.dir
    if not wanted or location is None:
        return None, None
    try:
        shards = ShardFolder.open(location, on_corrupt=OnCorrupt.skip, cache=config.data.cache)
        if fingerprint and shards.fingerprint != fingerprint:
            return None, "those in their place now are others"
    except (DataError, OSError):
        return None, "they are not where the run had them"
    return shards, None


def _text(description: str, corpus: str) -> str:
    """What a source is: its description, with where it was read from if that says more."""
    corpus = Path(corpus).name if Path(corpus).is_absolute() else corpus
    return description if corpus in description else f"{description} ({corpus})"


def _origins(events: list[dict[str, Any]]) -> Iterator[str]:
    began: dict[str, str] = {
        EventKind.import_: "It was imported from",
        EventKind.upcycle: "It was upcycled from",
        EventKind.branch: "It was branched from",
    }
    for event in events:
        kind, source = str(event.get("event")), event.get("source")
        if kind in began and isinstance(source, str):
            name = without_secrets(source).rstrip("/").rpartition("/")[2]
            yield f"{began[kind]} {name}."


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if (number := _number(value)) is not None:
            yield name, number


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
