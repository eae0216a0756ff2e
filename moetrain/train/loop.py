"""When to step, log, validate, save and stop."""

import resource
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from data_pipeline import Batch
from moetrain.checkpoint.folders import require_newest
from moetrain.kinds import EventKind
from moetrain.observe import EXPERT_LOAD, numbers_of
from moetrain.optim import learning_rate
from moetrain.parallel import BETWEEN_STEPS, any_rank, any_rank_each, begin_micro_batch
from moetrain.train.control import Outcome
from moetrain.train.means import RunningMeans, dead_experts
from moetrain.train.micro_batch import MicroBatch, noise_seeds
from moetrain.train.state import checkpoint_tensors
from moetrain.train.step import train_step
from moetrain.train.step_report import StepReport
from moetrain.train.stopwatch import Stopwatch
from moetrain.train.trainer import Trainer
from moetrain.train.validation import validate

FORCED_BALANCE = (
    "model.router.force_balance=true: experts are chosen evenly, whatever the router says. That "
    "is for measuring speed; the model that comes of it is of no use"
)


class TrainingError(Exception):
    """Training can't continue; the message says why."""


def train(trainer: Trainer) -> Outcome:
    """Trains until all steps are done, time is over or a stop is requested; all ranks call it.

    Raises TrainingError after too many consecutive skipped steps, CheckpointError where a
    checkpoint can't be written; earlier checkpoints stay as they are.
    """
    settings, state, control = trainer.config.train, trainer.state, trainer.control
    tally, callbacks = trainer.tally, trainer.callbacks.values()
    checkpoint, deadline = trainer.config.checkpoint, trainer.deadline
    stopwatch, last, saved_step = Stopwatch(), {}, state.step
    if trainer.config.model.router.force_balance and trainer.config.model.is_moe:
        _warn(trainer, FORCED_BALANCE)
    trainer.event(
        EventKind.training,
        step=state.step,
        attempt=trainer.place.attempt,
        ranks=trainer.place.world_size,
    )
    tally.begin(trainer.place.attempt)
    deadline.begin()
    for callback in callbacks:
        callback.run_start(trainer)
    if state.step == 0 and settings.validate_at_start and not any_rank(control.stop_requested):
        last = validate_at_start(trainer)
        stopwatch.restart()
    while state.step < deadline.last_step:
        control.heartbeat(BETWEEN_STEPS, state.step)
        leaves = control.stop_requested or trainer.checkpoints.failed
        leaves, is_over = any_rank_each(leaves, deadline.is_over)
        if leaves:
            break
        if is_over:
            deadline.end_with(state.step + 1)
        report = take_step(trainer, stopwatch)
        for callback in callbacks:
            callback.step_end(trainer, report)
        if _records(trainer, state.step):
            record = metric_record(trainer, report, stopwatch)
            if _validates(trainer, state.step):
                record |= run_validation(trainer)
            write_record(trainer, record)
            last = numbers_of(record)
            state.since_record = RunningMeans()
            stopwatch.restart()
        if state.step == deadline.last_step or _due(state.step, checkpoint.every_steps):
            with stopwatch.saving(), tally.saving(state.step):
                save(trainer)
            saved_step = state.step
            if any_rank(control.move_requested):
                break
        tally.sign(state.step)
    if state.step > saved_step:
        with tally.saving(state.step):
            save(trainer)
    control.heartbeat("ending", state.step)
    trainer.checkpoints.wait()
    outcome = Outcome(finished=state.step >= deadline.last_step, step=state.step, last=last)
    for callback in callbacks:
        callback.run_end(trainer, outcome)
    return outcome


def take_step(trainer: Trainer, stopwatch: Stopwatch) -> StepReport:
    """Reads this rank's part of the next global batch, takes the step and advances the state."""
    config, state, sources = trainer.config, trainer.state, trainer.shards.sources
    records = _records(trainer, state.step + 1)
    trainer.control.activity.begin("reading data")
    with stopwatch.waiting_for_data():
        batch = trainer.prefetcher.read(state.samples)
        micro_batches = MicroBatch.cut(
            batch,
            config.train.micro_batch_size,
            device=trainer.device,
            mask_documents=config.data.mask_documents,
            noise_seeds=noise_seeds(config, _samples(trainer)),
        )
    report = train_step(
        micro_batches,
        model=trainer.model,
        optimizer=trainer.optimizer,
        gradients=trainer.gradients,
        objective=trainer.objective,
        meshes=trainer.meshes,
        learning_rate=_learning_rate(trainer),
        begin_micro_batch=partial(begin_micro_batch, trainer.model, config.parallel),
        begin=trainer.control.activity.begin,
        before_update=trainer.weights.remember if records else lambda: None,
        data_counts=[*tokens_by_source(batch, num_sources=len(sources)), batch.num_corrupt],
        num_sources=len(sources),
        metrics=trainer.metrics if records else {},
    )
    stopwatch.count(report.num_tokens)
    state.step += 1
    state.count_sequences(config.train.global_batch_size, flops=trainer.flops_per_sequence)
    state.tokens += report.num_tokens
    *source_tokens, num_corrupt = report.data_counts
    for source, tokens in zip(sources, source_tokens, strict=True):
        state.source_tokens[source] = state.source_tokens.get(source, 0) + tokens
    state.corrupt_sequences += num_corrupt
    state.skipped += report.skipped
    state.since_record.add(report, source_tokens=dict(zip(sources, source_tokens, strict=True)))
    diverges = report.skipped and report.num_tokens > 0
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if diverges else 0
    if report.skipped:
        _tell_of_skip(trainer, report)
    return report


def tokens_by_source(batch: Batch, *, num_sources: int) -> list[int]:
    """Returns the number of valid targets of each source in a rank's slice of a batch."""
    valid = batch.loss_mask.sum(1)
    counts = np.bincount(batch.sources, weights=valid, minlength=num_sources)
    return [int(count) for count in counts]


def save(trainer: Trainer) -> None:
    """Writes a checkpoint of the current state."""
    trainer.control.heartbeat("save", trainer.state.step)
    trainer.state.position = trainer.batches.position(trainer.state.samples)
    trainer.state.seconds = trainer.deadline.seconds
    trainer.state.callbacks = {name: c.state() for name, c in trainer.callbacks.items()}
    trainer.checkpoints.save(
        checkpoint_tensors(trainer.model, trainer.optimizer),
        step=trainer.state.step,
        state=trainer.state.as_json(),
    )
    for callback in trainer.callbacks.values():
        callback.checkpoint(trainer)


def run_validation(trainer: Trainer) -> dict[str, float]:
    """Returns the held-out metrics at this step."""
    settings = trainer.config.train
    trainer.control.heartbeat("validation", trainer.state.step)
    with trainer.tally.validating():
        metrics = validate(
            trainer.model,
            trainer.held_out,
            weights=_validation_weights(trainer),
            micro_batch_size=settings.micro_batch_size,
            mask_documents=trainer.config.data.mask_documents,
            meshes=trainer.meshes,
            device=trainer.device,
        )
    for callback in trainer.callbacks.values():
        callback.validation_end(trainer, metrics)
    return metrics


def validate_at_start(trainer: Trainer) -> dict[str, float | int | None]:
    """Validates the weights that a run begins with; returns the numbers of the record of step 0.

    Empty, and no record, where no text is held out.
    """
    metrics = run_validation(trainer)
    if not metrics:
        return {}
    record = {"step": 0, "train/tokens": 0, **metrics}
    write_record(trainer, record)
    return numbers_of(record)


def _validation_weights(trainer: Trainer) -> dict[str, float] | None:
    """Returns the weight of each source in the pooled loss; None: its number of tokens."""
    if trainer.config.train.validation_weights == "tokens":
        return None
    return trainer.batches.shares(max(0, trainer.state.step - 1))


def metric_record(trainer: Trainer, report: StepReport, stopwatch: Stopwatch) -> dict[str, Any]:
    """Returns the metrics of the steps since the last record, under their public names."""
    config, state = trainer.config, trainer.state
    means = state.since_record.values(report)
    speed, num_ranks = stopwatch.tokens_per_second(), config.num_ranks
    record: dict[str, Any] = {
        "step": state.step,
        "train/tokens": state.tokens,
        "train/flops": state.flops,
        "train/loss": means["train/loss"],
        "train/cross_entropy": means["train/cross_entropy"],
        "train/skipped_steps": state.skipped,
        "optim/lr": _learning_rate(trainer, step=state.step - 1),
        "optim/grad_norm": means["optim/grad_norm"],
        "perf/step_seconds": stopwatch.step_seconds(),
        "perf/tokens_per_second": speed,
        "perf/tokens_per_second_per_device": speed / num_ranks,
        "perf/data_wait_seconds": stopwatch.data_wait_seconds(),
        "memory/peak_gib": _peak_gib(trainer.device),
    }
    if report.head_z_loss is not None:
        record["train/z_loss"] = means["train/z_loss"]
    if (effective := trainer.tally.effective()) is not None:
        record["perf/effective_training_time"] = effective
    if (seconds := trainer.tally.device_seconds(num_ranks)) is not None:
        record["perf/gpu_seconds"] = seconds
    if trainer.stragglers is not None:
        record |= trainer.stragglers.compare(
            step=state.step,
            step_seconds=stopwatch.step_seconds(),
            data_wait_seconds=stopwatch.data_wait_seconds(),
        )
    if (stalled := stopwatch.stall_seconds()) is not None:
        record["checkpoint/stall_seconds"] = stalled
    if peak := config.cluster.peak_tflops_per_gpu:
        flops = trainer.flops_per_sequence / config.train.seq_len * speed
        record["perf/model_flops_utilization"] = flops / (num_ranks * peak * 1e12)
    record |= means | trainer.weights.measure() | data_metrics(trainer)
    if config.model.is_moe:
        record |= router_metrics(report, means)
    for name, metric in trainer.metrics.items():
        sums = report.metric_sums.get(name, torch.zeros(0, dtype=torch.float64))
        for key, value in metric.values(sums, report, trainer.model).items():
            if key in record:
                raise ValueError(f"metric {name} gives {key}, which the record has already")
            record[key] = value
    return record


def write_record(trainer: Trainer, record: Mapping[str, Any]) -> None:
    """Writes a record to every sink; CheckpointError where a newer attempt trains the run."""
    if trainer.sinks:
        require_newest(trainer.config.run_dir / "checkpoints", trainer.place.attempt)
    for sink in trainer.sinks:
        sink.write(record)


def data_metrics(trainer: Trainer) -> dict[str, float]:
    """Returns each source's tokens, share of the samples, and epochs so far."""
    state = trainer.state
    metrics: dict[str, float] = {
        f"data/{source}/tokens": tokens for source, tokens in state.source_tokens.items()
    }
    drawn = trainer.batches.drawn(state.samples)
    for source, samples in drawn.items():
        metrics[f"data/{source}/share"] = samples / max(1, state.samples)
    for source, num_sequences in trainer.batches.num_sequences.items():
        metrics[f"data/{source}/epochs"] = drawn[source] / num_sequences
    if state.corrupt_sequences:
        metrics["data/corrupt_sequences"] = state.corrupt_sequences
    return metrics


def router_metrics(report: StepReport, means: Mapping[str, float]) -> dict[str, Any]:
    """Returns the balance of the experts: means, and the last batch's loads by layer."""
    counts = report.expert_counts  # [layers, experts]
    loads = counts / counts.sum(1, keepdim=True).clamp_min(1)  # zeros if no token counted
    names = ("load_balance_loss", "z_loss", "max_violation", "entropy")
    metrics: dict[str, Any] = {f"router/{name}": means[f"router/{name}"] for name in names}
    metrics["router/dead_experts"] = dead_experts(counts)
    metrics[EXPERT_LOAD] = loads.tolist()
    return metrics


def _samples(trainer: Trainer) -> range:
    """Returns the global numbers of the samples that this rank reads for the next step."""
    first = trainer.state.samples
    mine = trainer.meshes.share.sequences(trainer.config.train.global_batch_size)
    return range(first + mine.start, first + mine.stop)


def _learning_rate(trainer: Trainer, *, step: int | None = None) -> float:
    return learning_rate(
        trainer.state.step if step is None else step,
        peak=trainer.config.optim.lr,
        num_steps=trainer.config.train.num_steps,
        settings=trainer.config.schedule,
    )


def _warn(trainer: Trainer, reason: str) -> None:
    trainer.event(EventKind.warning, step=trainer.state.step, reason=reason)
    trainer.control.publish("say", f"warning: {reason}")


def _tell_of_skip(trainer: Trainer, report: StepReport) -> None:
    state = trainer.state
    reason = f"loss {report.loss}, gradient norm {report.grad_norm}"
    if not report.num_tokens:
        reason = "none of its tokens counts: all of its documents are damaged"
    trainer.event(EventKind.step_skipped, step=state.step, reason=reason)
    trainer.control.publish("say", f"step {state.step} was skipped: {reason}")
    if state.skipped_in_a_row >= trainer.config.train.max_skipped_steps:
        newest = trainer.config.run_dir / "checkpoints"
        raise TrainingError(
            f"{state.skipped_in_a_row} steps in a row up to step {state.step} had no finite loss "
            f"or gradient ({reason}). The last good checkpoint is in {newest}. Try a lower "
            "optim.lr, a longer schedule.warmup_steps, or a smaller optim.clip_grad_norm"
        )


def _validates(trainer: Trainer, step: int) -> bool:
    """Returns whether a step is followed by a validation."""
    every = trainer.config.train.validate_every_steps
    return step == trainer.deadline.last_step or _due(step, every)


def _records(trainer: Trainer, step: int) -> bool:
    """Returns whether a step ends with a record of metrics."""
    return _validates(trainer, step) or _due(step, trainer.config.observe.log_every_steps)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
