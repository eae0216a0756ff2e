"""The composition root: settings become objects here, top to bottom, and nowhere else."""

import logging
import os
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from data_pipeline import (
    DataError,
    GlobalBatches,
    Prefetcher,
    ShardFolder,
    ValidationBatches,
    open_folder,
)
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.remote.of_run import start_uploads
from moetrain.checkpoint.remote.uploader import Uploader
from moetrain.checkpoint.store import CheckpointStore
from moetrain.kinds import EventKind
from moetrain.model import Transformer
from moetrain.observe import (
    EventLog,
    GuardedSink,
    MetricsFile,
    Sink,
    Tally,
    WandbSink,
)
from moetrain.optim import allocate_state, build_optimizer
from moetrain.parallel import (
    Activity,
    Gradients,
    Meshes,
    build_meshes,
    parallelize,
    resolve_topology,
    settle_attention,
    settle_backend,
)
from moetrain.parallel.parallelize import initialise
from moetrain.registries import CALLBACKS, SINKS
from moetrain.settings import Resolved
from moetrain.train.changes import as_plain
from moetrain.train.control import Control, DisplaySink, RankPlace, collective_timeout
from moetrain.train.deadline import Deadline
from moetrain.train.objective import build_objective
from moetrain.train.parameter_groups import freeze, parameter_roles
from moetrain.train.prepare import global_batches
from moetrain.train.preview import preview_of
from moetrain.train.resume import (
    begins_optimizer,
    in_one_line,
    require_same_model,
    told_changes,
)
from moetrain.train.state import TrainState, checkpoint_tensors
from moetrain.train.step_report import build_metrics
from moetrain.train.stragglers import Stragglers
from moetrain.train.trainer import Callback, Trainer
from moetrain.train.weight_norms import WeightNorms

log = logging.getLogger(__name__)


def build_trainer(
    config: Resolved, place: RankPlace, control: Control, *, device: torch.device
) -> Trainer:
    """Returns a rank's trainer, restored from the newest good checkpoint; all ranks call it."""
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    timeout = collective_timeout(config.launch.hang_timeout_seconds)
    model, optimizer, gradients, meshes = build_model(
        config,
        device=device,
        timeout_seconds=timeout,
        activity=control.activity,
        initialised=False,
    )
    shards = _opened_shards(config, place)
    leads = place.rank == 0  # the one rank whose sinks are built
    event = EventLog(run_dir / "events.jsonl").write if leads else _tell_nobody
    tally = Tally(run_dir if leads else None)

    def say(text: str) -> None:
        if leads:
            control.publish("say", text)

    uploader = _uploader(config, place, control, event=event) if leads else None
    checkpoints = CheckpointStore(
        run_dir / "checkpoints",
        config.checkpoint,
        attempt=place.attempt,
        config=as_plain(config),
        mesh=_mesh(config, place, device),
        timeout=timedelta(seconds=timeout),
        event=tally.on_save(event),
        good=_tell_nobody if uploader is None else uploader.submit,
        in_use=set if uploader is None else uploader.busy,
        alive=control.keep_alive,
    )
    state, resumed_from = _restored(config, checkpoints, model, optimizer, shards)
    if resumed_from is None:  # a checkpoint has every weight and buffer
        initialise(model, seed=config.seed, device=device)
    batches = global_batches(config, shards, position=state.position)
    if resumed_from:
        _tell_of_resume(config, place, state, resumed_from, batches, event=event, say=say)
    watch = partial(Stragglers, device=device, activity=control.activity, event=event, say=say)
    prefetcher = Prefetcher(
        batches,
        first_sample=state.samples,
        rank=meshes.share.batch_rank,
        num_ranks=meshes.topology.num_batch_ranks,
        num_workers=config.data.num_workers,
        prefetch_batches=config.data.prefetch_batches,
    )
    return Trainer(
        config=config,
        place=place,
        control=control,
        device=device,
        model=model,
        optimizer=optimizer,
        gradients=gradients,
        weights=WeightNorms(model, meshes, updates=config.observe.update_sizes),
        objective=build_objective(config.train),
        meshes=meshes,
        shards=shards,
        batches=batches,
        prefetcher=prefetcher,
        held_out=_held_out(config, shards, num_parts=meshes.topology.num_batch_ranks),
        checkpoints=checkpoints,
        uploader=uploader,
        state=state,
        sinks=_sinks(config, control, state, resumes=resumed_from is not None, event=event)
        if leads
        else [],
        event=event,
        stragglers=None if config.num_ranks == 1 else watch(model, step=state.step),
        tally=tally,
        deadline=Deadline(config.train, seconds=state.seconds, leads=leads),
        callbacks=_callbacks(config, state),
        metrics=build_metrics(config.observe),
    )


def _callbacks(config: Resolved, state: TrainState) -> dict[str, Callback]:
    """Returns the callbacks of extensions, with their state from the checkpoint."""
    given, made = config.train.callback_options, dict[str, Callback]()
    for name in config.train.callbacks:
        options = CALLBACKS.typed_options(name, given.get(name, {}))
        made[name] = CALLBACKS.get(name).made(options)
        if name in state.callbacks:
            made[name].restore(state.callbacks[name])
    return made


def _opened_shards(config: Resolved, place: RankPlace) -> ShardFolder:
    """Returns the run's shards; raises DataError where this rank's machine doesn't see them."""
    folder = config.data.dir
    if "://" not in folder and not os.path.exists(folder):
        raise DataError(
            f"data.dir={folder}: rank {place.rank}, on {socket.gethostname()}, doesn't see this "
            "folder of shards, which was there on the machine that the run was started from: put "
            "it on storage that all nodes share; data.cache.dir=DIR says where the shards of a "
            "text are built"
        )
    return open_folder(config.data)


def _restored(
    config: Resolved,
    checkpoints: CheckpointStore,
    model: Transformer,
    optimizer: Optimizer,
    shards: ShardFolder,
) -> tuple[TrainState, Manifest | None]:
    """Loads the newest good checkpoint, if any; returns the state and the manifest."""

    def unread(manifest: Manifest, name: str) -> bool:
        return name.startswith("optimizer.") and begins_optimizer(config, manifest)

    def loading(manifest: Manifest) -> dict[str, Tensor]:
        saved = (name for name in manifest.tensors if not unread(manifest, name))
        if any(name.startswith("optimizer.") for name in saved):
            allocate_state(optimizer)
        return checkpoint_tensors(model, optimizer)

    manifest = checkpoints.load_newest(
        loading, same_model=partial(require_same_model, config), unread=unread
    )
    state = TrainState.restored(manifest.state if manifest else {})
    state.data, state.tokenizer = shards.fingerprint, shards.tokenizer.fingerprint
    return state, manifest


def _tell_of_resume(
    config: Resolved,
    place: RankPlace,
    state: TrainState,
    resumed_from: Manifest,
    batches: GlobalBatches,
    *,
    event: Callable[..., None],
    say: Callable[[str], None],
) -> None:
    """Reports where a run resumes and what has changed; the state records changed settings."""
    event(EventKind.resume, step=state.step, attempt=place.attempt)
    say(f"resumes at step {state.step}")
    if changed := told_changes(config, resumed_from):
        told = in_one_line(config, resumed_from, changed)
        values = {c.name: [c.before, c.now] for c in changed}
        state.changes = [*state.changes, {"step": state.step, "changes": values}]
        event(EventKind.settings_changed, step=state.step, reason=told, changes=values)
        say(told)
    if change := order_change(state, batches):
        event(EventKind.data_order, step=state.step, reason=change)
        say(change)


def _sinks(
    config: Resolved,
    control: Control,
    state: TrainState,
    *,
    resumes: bool,
    event: Callable[..., None],
) -> list[Sink]:
    """Returns the sinks, the file first: a record that can't be written there goes nowhere."""

    def tell(text: str) -> None:
        event(EventKind.wandb, step=state.step, reason=text)
        control.publish("say", text)

    metrics = MetricsFile(config.run_dir / "metrics.jsonl")
    metrics.rewind(state.step or -1)  # from step 0 on that step is validated and recorded anew
    wandb = WandbSink(
        config.observe.wandb,
        run_name=config.run.name,
        run_dir=config.run_dir,
        config=as_plain(config) | preview_of(config).counts(),
        resume_step=state.step if resumes else None,
        tell=tell,
    )
    sinks = [metrics, wandb, DisplaySink(control)]
    for name in config.observe.sinks:
        options = SINKS.typed_options(name, config.observe.sink_options.get(name, {}))
        make = partial(
            SINKS.get(name).made,
            options,
            run_dir=config.run_dir,
            config=as_plain(config),
            resume_step=state.step if resumes else None,
        )

        def fail(text: str) -> None:
            event(EventKind.warning, step=state.step, reason=text)
            control.publish("say", f"warning: {text}")

        sinks.append(GuardedSink(make, name=name, fail=fail))
    return sinks


def _held_out(
    config: Resolved, shards: ShardFolder, *, num_parts: int
) -> dict[str, ValidationBatches]:
    return {
        source: ValidationBatches(
            shards,
            source=source,
            seq_len=config.train.seq_len,
            batch_size=config.train.micro_batch_size * num_parts,
            max_sequences=config.train.validation_sequences,
            seed=config.seed,
            on_corrupt=config.data.on_corrupt,
        )
        for source in shards.sources
    }


def build_model(
    config: Resolved,
    *,
    device: torch.device,
    timeout_seconds: float,
    activity: Activity | None = None,
    initialised: bool = True,
) -> tuple[Transformer, Optimizer, Gradients, Meshes]:
    """Returns this rank's part of the fresh model, its optimizer and gradients, and its meshes.

    If `initialised` is false the weights are left to be filled.
    All ranks of the world call it. Collectives time out after `timeout_seconds`.
    """
    topology = resolve_topology(
        config.parallel,
        world_size=config.num_ranks,
        num_experts=config.model.num_experts,
        ffn_hidden_dim=config.model.ffn_hidden_dim,
        ranks_per_node=config.cluster.gpus_per_node,
    )
    meshes = build_meshes(topology, device=device, timeout_seconds=timeout_seconds)
    dtype = compute_dtype(config.train.dtype, device)
    with torch.device("meta"):
        model = Transformer(config.model)
    freeze(model, config.optim)
    model = parallelize(
        model,
        meshes,
        config.parallel,
        seed=config.seed if initialised else None,
        device=device,
        compute_dtype=dtype,
        activity=activity,
    )
    settle_backend(
        model,
        meshes,
        num_tokens=config.train.micro_batch_size * config.train.seq_len,
        device=device,
        dtype=dtype,
        deterministic=config.train.deterministic,
    )
    settle_attention(
        model,
        batch=config.train.micro_batch_size,
        length=config.train.seq_len,
        by_document=config.data.mask_documents,
        device=device,
        dtype=dtype,
        deterministic=config.train.deterministic,
    )
    roles = parameter_roles(model)
    optimizer = build_optimizer(model.parameters(), config.optim, roles=roles)
    gradients = Gradients(
        model.parameters(), max_norm=config.optim.clip_grad_norm, roles=list(roles.values())
    )
    return model, optimizer, gradients, meshes


def order_change(state: TrainState, batches: GlobalBatches) -> str | None:
    """Returns a message where a restored run's samples come in another order than before."""
    if not state.samples:
        return None
    before, now = state.position["units"], batches.position(state.samples)["units"]
    before, now = ({name: units for name, units in u.items() if units} for u in (before, now))
    if before == now:
        return None
    return f"from step {state.step} on the sources are mixed {_shares(now)}, not {_shares(before)}"


def _shares(units: Mapping[str, int]) -> str:
    total = sum(units.values())
    return ", ".join(f"{name} {share / total:.4g}" for name, share in units.items())


def _mesh(config: Resolved, place: RankPlace, device: torch.device) -> dict[str, Any]:
    """Returns the manifest's description of the layout that wrote it."""
    return {
        "world_size": place.world_size,
        "data_replicate": config.parallel.data_replicate_degree,
        "data_shard": config.parallel.data_shard_degree,
        "expert": config.parallel.expert_degree,
        "context": config.parallel.context_degree,
        "tensor": config.parallel.tensor_degree,
        "pipeline": config.parallel.pipeline_degree,
        "device": device.type,
        "compute_dtype": str(compute_dtype(config.train.dtype, device)).removeprefix("torch."),
    }


def _uploader(
    config: Resolved, place: RankPlace, control: Control, *, event: Callable[..., None]
) -> Uploader | None:
    """Returns the uploader of this attempt's checkpoints, if any; it prints failures."""

    def tell(kind: EventKind, **fields: Any) -> None:
        event(kind, **fields)
        if kind == EventKind.upload_failed:
            control.publish("say", f"warning: training continues, not uploaded: {fields['reason']}")

    name = config.run.name
    return start_uploads(config.checkpoint, run=name, attempt=place.attempt, event=tell)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of a setting on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _tell_nobody(*_: Any, **__: Any) -> None:
    pass
