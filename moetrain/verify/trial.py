"""What one rank of a layout does: it trains on the batches and compares with a reference.

The model, its sharding and the step are those of training. What others compare with is written
into a folder (`records.py`); every rank of another layout reads it there, so that nothing large
passes between processes.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from data_pipeline import Batch
from data_pipeline.extensions import load_recorded
from moetrain.checkpoint.blocks import held
from moetrain.model import Transformer
from moetrain.parallel import begin_micro_batch, plain_name
from moetrain.settings import Resolved
from moetrain.train.build import build_model
from moetrain.train.micro_batch import MicroBatch, noise_seeds
from moetrain.train.objective import build_objective
from moetrain.train.step import train_step
from moetrain.train.step_report import StepReport, build_metrics
from moetrain.verify import records
from moetrain.verify.comparison import Difference, worst
from moetrain.verify.ranks import Tell
from moetrain.verify.records import GRADIENTS, REPORTS, Tensors, Update
from moetrain.verify.routing import RoutingWatch
from moetrain.verify.tolerance import Tolerances

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One layout to try, with the folders of its batches and records."""

    config: Resolved
    """Resolved in the layout."""
    batches: Path
    rates: tuple[float, ...]
    """The learning rate of each step."""
    tolerances: Tolerances
    tie_tolerance: float
    """How far scores of experts may be apart, of a token's largest, for rounding to decide."""
    against: Path | None
    """The records to compare with; None: nothing."""
    records: Path | None
    """Where to write records for others to compare with; None: nowhere."""
    timeout_seconds: float
    one_by_one: Path | None = None
    """Records whose weights every step begins from, so that each step is compared by itself."""
    skipped_step: int | None = None
    """A step whose gradient is made infinite on one rank."""

    @property
    def grows(self) -> bool:
        """Whether each step begins from weights that are further apart."""
        return self.one_by_one is None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank found. Differences are by column; there are none without a reference."""

    losses: list[float]
    grad_norms: list[float]
    """Of the steps that were not skipped."""
    differences: dict[str, Difference]
    near_ties: int
    """Choices of experts, over all steps and layers, that differ by rounding alone."""
    digest: str
    """Of all gathered weights: equal on every rank, so that replicas are bit-equal."""
    chosen_again: tuple[int, ...] = ()
    """Layers whose backward pass chose experts a second time."""


def write_batches(folder: Path, batches: list[Batch]) -> None:
    """Writes the global batches, one a step, for every layout to train on."""
    for step, batch in enumerate(batches):
        arrays: dict[str, Any] = {
            name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray)
        }
        np.savez(folder / f"batch_{step}.npz", **arrays)


def read_batch(folder: Path, step: int, sequences: range | None = None) -> Batch:
    """Returns a step's global batch, or some of its sequences."""
    with np.load(folder / f"batch_{step}.npz") as whole:
        part = slice(None) if sequences is None else slice(sequences.start, sequences.stop)
        return Batch(**{name: whole[name][part] for name in whole.files})


def run_trial(trial: Trial, tell: Tell) -> Measured:
    """Trains as one rank of an already joined world; all ranks of the layout call it."""
    logging.disable(logging.WARNING)  # an unbalanced first step is no news here
    config = trial.config
    load_recorded(config.run.extensions, where="a rank of the verification")
    model, optimizer, gradients, meshes = build_model(
        config, device=CPU, timeout_seconds=trial.timeout_seconds
    )
    mine = meshes.share.sequences(config.train.global_batch_size)
    comparison = _Comparison(trial, model, optimizer)
    square_sum = gradients.square_sum

    def look_and_sum() -> Tensor:
        # Before clipping, so that a wrong scale shows where it is and not in every tensor; at the
        # first step only, because from the second on all gradients follow from other weights.
        if step == 0:
            comparison.of_gradients()
        if step == trial.skipped_step:
            _make_infinite(model)
        return square_sum()

    gradients.square_sum = look_and_sum  # type: ignore[method-assign]
    watch = RoutingWatch(
        seq_len=config.train.seq_len,
        against=trial.against,
        records=trial.records,
        tolerance=trial.tie_tolerance,
    )
    metrics = build_metrics(config.observe)
    reports: list[StepReport] = []
    for step, rate in enumerate(trial.rates):
        tell(step)
        reports.append(
            train_step(
                watch.begin(
                    step,
                    _read(trial, step, mine),
                    first_sequence=mine.start,
                    grows=trial.grows,
                ),
                model=model,
                objective=build_objective(config.train),
                optimizer=optimizer,
                gradients=gradients,
                meshes=meshes,
                learning_rate=rate,
                begin_micro_batch=partial(begin_micro_batch, model, config.parallel),
                metrics=metrics,
                begin=watch.enter,
            )
        )
        watch.end()
        comparison.after(step, skipped=reports[-1].skipped)
    comparison.of_reports([_figures(report) for report in reports])
    return Measured(
        losses=[report.loss for report in reports],
        grad_norms=[r.grad_norm for s, r in enumerate(reports) if s != trial.skipped_step],
        differences=comparison.worst(),
        near_ties=watch.near_ties,
        digest=_digest(dict(_gathered(model))),
        chosen_again=tuple(sorted(watch.chosen_again)),
    )


class _Comparison:
    """One rank's view: writes records, compares with those of the reference, step by step."""

    def __init__(self, trial: Trial, model: Transformer, optimizer: Optimizer) -> None:
        self._trial, self._model, self._optimizer = trial, model, optimizer
        self._before: Tensors = {} if trial.records is None else dict(_gathered(model))
        self._found: dict[str, list[Difference]] = {}
        self._decay, self._updates = 1.0, 0

    def worst(self) -> dict[str, Difference]:
        """Returns the worst difference of each column that was compared."""
        found = {column: worst(differences) for column, differences in self._found.items()}
        return {column: difference for column, difference in found.items() if difference}

    def of_gradients(self) -> None:
        """Looks at the gradients before clipping."""
        own = {}
        for name, parameter in self._model.named_parameters():
            gradient = parameter.grad
            own[plain_name(name)] = _full(
                torch.zeros_like(parameter) if gradient is None else gradient
            )
        if self._trial.records is not None:
            torch.save(own, self._trial.records / GRADIENTS)
        if self._trial.against is not None:
            reference = records.load(self._trial.against, GRADIENTS)
            self._add(records.compare_gradients(own, reference, tolerances=self._trial.tolerances))

    def after(self, step: int, *, skipped: bool) -> None:
        """Looks at weights and state after a step: each one's, or the last one's."""
        trial, optim = self._trial, self._trial.config.optim
        if not skipped:
            self._decay *= 1 - trial.rates[step] * optim.weight_decay
            self._updates += 1
        is_last = step == len(trial.rates) - 1
        # Of steps that grow apart the last one says all; the first is the compute dtype's.
        writes = trial.records is not None and (is_last or step == 0 or not trial.grows)
        compares = trial.against is not None and (is_last or not trial.grows)
        if not (writes or compares):
            return
        weights = dict(_gathered(self._model))
        state = _state(self._model, self._optimizer)
        if writes and trial.records is not None:
            update = Update(
                before=self._before,
                weights=weights,
                decay=self._decay,
                state=state,
                updates=self._updates,
            )
            records.write_update(
                *(trial.records, step, update),
                optim=optim,
                lr=0.0 if skipped else trial.rates[step],
                tolerances=trial.tolerances,
            )
        if compares and trial.against is not None:
            theirs = records.load(trial.against, records.after_file(step))
            note = "" if trial.grows else f" after step {step + 1}"
            steps = step + 1 if trial.grows else 1
            for column, found in (
                ("weights", records.compare_weights(
                    weights, theirs, steps=steps, tolerances=trial.tolerances, note=note
                )),
                ("state", records.compare_state(
                    state, theirs, tolerances=trial.tolerances, note=note
                )),
            ):  # fmt: skip
                self._found.setdefault(column, []).extend(found)
        if trial.one_by_one is not None:
            theirs = records.load(trial.one_by_one, records.after_file(step))
            _take_weights(self._model, theirs["weights"])
            self._before, self._decay = dict(_gathered(self._model)), 1.0

    def of_reports(self, figures: list[Tensors]) -> None:
        """Looks at the figures of all steps."""
        if self._trial.records is not None:
            torch.save(figures, self._trial.records / REPORTS)
        if self._trial.against is not None:
            reference = records.load(self._trial.against, REPORTS)
            self._add(
                records.compare_reports(
                    figures, reference, tolerances=self._trial.tolerances, grows=self._trial.grows
                )
            )

    def _add(self, found: dict[str, Difference | None]) -> None:
        for column, difference in found.items():
            if difference is not None:
                self._found.setdefault(column, []).append(difference)


def _read(trial: Trial, step: int, sequences: range) -> list[MicroBatch]:
    """Returns some sequences of a step's global batch, in micro-batches."""
    first = step * trial.config.train.global_batch_size
    samples = range(first + sequences.start, first + sequences.stop)
    return MicroBatch.cut(
        read_batch(trial.batches, step, sequences),
        trial.config.train.micro_batch_size,
        device=CPU,
        mask_documents=trial.config.data.mask_documents,
        noise_seeds=noise_seeds(trial.config, samples),
    )


def _gathered(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yields parameters and buffers whole, under their plain names; collective."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield plain_name(name), _full(tensor)


def _full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.clone()  # on one rank it is the parameter itself, which the next step moves


def _state(model: Transformer, optimizer: Optimizer) -> dict[str, Tensors]:
    """Returns the optimizer's tensors whole, by key and plain name; collective."""
    found: dict[str, Tensors] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found.setdefault(key, {})[plain_name(name)] = _full(value)
    return found


@torch.no_grad()
def _take_weights(model: Transformer, weights: Tensors) -> None:
    """Copies whole weights into this rank's shards."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local, offset = held(tensor)
        block = tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))
        local.copy_(weights[plain_name(name)][block])


def _make_infinite(model: Transformer) -> None:
    """Makes one number of a gradient infinite, on the last rank only."""
    if dist.get_rank() < dist.get_world_size() - 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None and (local := held(parameter.grad).local).numel():
            local.view(-1)[0] = math.inf
            return


def _digest(weights: Tensors) -> str:
    digest = hashlib.sha256()
    for full in weights.values():
        digest.update(full.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _figures(report: StepReport) -> Tensors:
    """Returns all figures of a step's report as tensors."""
    values = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    values |= {f"metric {name}": sums for name, sums in values.pop("metric_sums").items()}
    norms = values.pop("grad_norms")  # parts of grad_norm, from whose gradients they are
    values |= {} if report.skipped else {f"grad_norm of {role}": n for role, n in norms.items()}
    values.pop("clip_factor")  # follows from grad_norm
    if report.skipped:
        values.pop("grad_norm")  # it isn't finite, which is why
    return {
        name: torch.as_tensor(value, dtype=torch.float64)
        for name, value in values.items()
        if value is not None
    }
