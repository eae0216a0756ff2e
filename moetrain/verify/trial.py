"""What one rank of a layout does: it trains on the batches and compares with the reference.

The model, its sharding and the step are those of training. The reference writes its first
gradients, its weights and its routing into the folder of the verification; every rank of
another layout reads them there, so that nothing large passes between processes.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data_pipeline import Batch
from data_pipeline.extensions import load_recorded
from moetrain.model import Transformer
from moetrain.parallel import plain_name
from moetrain.settings import Resolved
from moetrain.train.build import build_model
from moetrain.train.micro_batch import MicroBatch, noise_seeds
from moetrain.train.objective import build_objective
from moetrain.train.step import train_step
from moetrain.train.step_report import StepReport, build_metrics
from moetrain.verify.comparison import KINDS, Difference, difference, kind_of, norm, parts, worst
from moetrain.verify.ranks import Tell
from moetrain.verify.tolerance import Tolerances

CPU = torch.device("cpu")
GRADIENTS, WEIGHTS, MOVED, REPORTS = "gradients.pt", "weights.pt", "moved.pt", "reports.pt"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One layout to try, and the folder of the verification with its batches."""

    config: Resolved
    """Resolved in the layout."""
    folder: Path
    num_steps: int
    tolerances: Tolerances
    is_reference: bool
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank found. Differences are by column; the reference has none."""

    losses: list[float]
    grad_norms: list[float]
    differences: dict[str, Difference]
    near_ties: int
    """Choices of experts, over all steps and layers, that differ by rounding alone."""
    digest: str
    """Of all gathered weights: equal on every rank, so that replicas are bit-equal."""


def write_batches(folder: Path, batches: list[Batch]) -> None:
    """Writes the global batches, one a step, for every layout to train on."""
    for step, batch in enumerate(batches):
        arrays: dict[str, Any] = {
            name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray)
        }
        np.savez(folder / f"batch_{step}.npz", **arrays)


def run_trial(trial: Trial, tell: Tell) -> Measured:
    """Trains as one rank of an already joined world; all ranks of the layout call it."""
    logging.disable(logging.WARNING)  # an unbalanced first step is no news here
    config = trial.config
    load_recorded(config.run.extensions, where="a rank of the verification")
    model, optimizer, gradients, meshes = build_model(
        config, device=CPU, timeout_seconds=trial.timeout_seconds
    )
    mine = meshes.share.sequences(config.train.global_batch_size)
    initial = dict(_gathered(model)) if trial.is_reference else {}
    clip = gradients.clip
    found: dict[str, Difference | None] = {}

    def look_and_clip() -> float:
        # Before clipping, so that a wrong scale shows where it is and not in every tensor; at the
        # first step only, because from the second on all gradients follow from other weights.
        if step == 0:
            found.update(_gradients(trial, model))
        return clip()

    gradients.clip = look_and_clip  # type: ignore[method-assign]
    watch = RoutingWatch(trial)
    metrics = build_metrics(config.observe)
    reports: list[StepReport] = []
    for step in range(trial.num_steps):
        tell(step)
        reports.append(
            train_step(
                watch.begin(step, _read(trial, step, mine), first_sequence=mine.start),
                model=model,
                objective=build_objective(config.train),
                optimizer=optimizer,
                gradients=gradients,
                meshes=meshes,
                learning_rate=config.optim.lr,
                metrics=metrics,
            )
        )
        watch.end()
    weights, digest = _weights(trial, model, initial)
    figures = [_figures(report) for report in reports]
    if trial.is_reference:
        torch.save(figures, trial.folder / REPORTS)
    else:
        found |= {"weights": weights} | _reports(trial, figures)
    return Measured(
        losses=[report.loss for report in reports],
        grad_norms=[report.grad_norm for report in reports],
        differences={column: found[column] for column in found if found[column]},  # type: ignore[misc]
        near_ties=watch.near_ties,
        digest=digest,
    )


class RoutingWatch:
    """Observes each router's choice, and resolves near-ties as in the reference.

    Two experts whose scores are equal up to rounding may be chosen differently in two layouts.
    Neither choice is wrong, but the gradients then differ by that token's part. So where a layout's
    scores equal the reference's up to rounding, and its router would choose as the reference did
    from the reference's scores, the reference's choice is taken and counted; otherwise the choice
    stays, and shows as a difference.
    """

    def __init__(self, trial: Trial) -> None:
        self.near_ties = 0
        self._trial = trial
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # scores and choices, by layer
        self._step = 0

    def begin(
        self, step: int, batches: list[MicroBatch], *, first_sequence: int
    ) -> list[MicroBatch]:
        """Returns a step's micro-batches, observed; `first_sequence` is the index in the global
        batch of the first one's first sequence."""
        self._step = step
        self._seen = {} if self._trial.is_reference else _load(self._trial, f"routing_{step}.pt")
        token, watched = first_sequence * self._trial.config.train.seq_len, []
        for batch in batches:
            watched.append(replace(batch, choose=partial(self._choose, token)))
            token += batch.tokens.numel()
        return watched

    def end(self) -> None:
        """Writes the reference's choices to a file."""
        if self._trial.is_reference:
            torch.save(self._seen, self._trial.folder / f"routing_{self._step}.pt")

    def _choose(
        self, first_token: int, layer: int, scores: Tensor, rule: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Returns what tokens choose by scores [tokens, experts]; the first has its place in the
        global batch."""
        chosen = rule(scores)
        if self._trial.is_reference:
            self._seen[layer] = scores.detach().clone(), chosen.clone()
            return chosen
        rows = slice(first_token, first_token + len(scores))
        their_scores, theirs = (t[rows] for t in self._seen[layer])
        differs = (chosen.sort(-1).values != theirs.sort(-1).values).any(-1)
        apart = (scores - their_scores).abs().amax(-1)
        allowed = self._trial.tolerances.forward * (self._step + 1)
        # The rule must be the same one: given the reference's scores, it makes its choice.
        again = rule(their_scores)
        alike = (again.sort(-1).values == theirs.sort(-1).values).all(-1)
        near = differs & alike & (apart <= allowed * their_scores.abs().amax(-1))
        self.near_ties += int(near.sum())
        return torch.where(near.unsqueeze(-1), theirs, chosen)


def _read(trial: Trial, step: int, sequences: range) -> list[MicroBatch]:
    """Returns some sequences of a step's global batch, in micro-batches."""
    first = step * trial.config.train.global_batch_size
    samples = range(first + sequences.start, first + sequences.stop)
    with np.load(trial.folder / f"batch_{step}.npz") as whole:
        part = slice(sequences.start, sequences.stop)
        batch = Batch(**{name: whole[name][part] for name in whole.files})
    return MicroBatch.cut(
        batch,
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


def _gradients(trial: Trial, model: Transformer) -> dict[str, Difference | None]:
    """Returns the worst difference of each kind's gradients; the reference writes its own."""
    reference = {} if trial.is_reference else _load(trial, GRADIENTS)
    written: dict[str, Tensor] = {}
    found: dict[str, list[Difference]] = {kind: [] for kind in KINDS}
    total = math.hypot(*(norm(gradient) for gradient in reference.values()))
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        gradient = parameter.grad
        full = _full(torch.zeros_like(parameter) if gradient is None else gradient)
        if trial.is_reference:
            written[name] = full
            continue
        pairs = zip(parts(name, full), parts(name, reference[name]), strict=True)
        for (where, ours), (_, theirs) in pairs:
            allowed = trial.tolerances.gradients(size=norm(theirs), total=total)
            found[kind_of(name)].append(difference(where, ours, theirs, allowed=allowed))
    if trial.is_reference:
        torch.save(written, trial.folder / GRADIENTS)
    return {kind: worst(differences) for kind, differences in found.items()}


def _weights(
    trial: Trial, model: Transformer, initial: dict[str, Tensor]
) -> tuple[Difference | None, str]:
    """Returns how far the weights are apart, beside how far they moved, and a digest of them."""
    reference = {} if trial.is_reference else _load(trial, WEIGHTS)
    moved: dict[str, float] = {} if trial.is_reference else _load(trial, MOVED)
    written: dict[str, Tensor] = {}
    digest, found = hashlib.sha256(), []
    for name, full in _gathered(model):
        digest.update(full.contiguous().view(torch.uint8).numpy().data)
        if trial.is_reference:
            written[name] = full
            befores = parts(name, initial[name])
            for (where, now), (_, before) in zip(parts(name, full), befores, strict=True):
                moved[where] = norm(now.double() - before.double())
            continue
        pairs = zip(parts(name, full), parts(name, reference[name]), strict=True)
        for (where, ours), (_, theirs) in pairs:
            allowed = trial.tolerances.weights(
                steps=trial.num_steps, size=norm(theirs), moved=moved[where]
            )
            found.append(difference(where, ours, theirs, allowed=allowed, scale=moved[where]))
    if trial.is_reference:
        torch.save(written, trial.folder / WEIGHTS)
        torch.save(moved, trial.folder / MOVED)
    return worst(found), digest.hexdigest()


def _figures(report: StepReport) -> dict[str, Tensor]:
    """Returns all figures of a step's report as tensors."""
    values = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    values |= {f"metric {name}": sums for name, sums in values.pop("metric_sums").items()}
    return {
        name: torch.as_tensor(value, dtype=torch.float64)
        for name, value in values.items()
        if value is not None
    }


def _reports(trial: Trial, figures: list[dict[str, Tensor]]) -> dict[str, Difference | None]:
    """Returns the worst difference of the losses, counts and entropies, and that of the norms."""
    found: dict[str, list[Difference]] = {"loss": [], "grad_norm": []}
    for step, (ours, theirs) in enumerate(zip(figures, _load(trial, REPORTS), strict=True)):
        for name, value in ours.items():
            is_norm = name == "grad_norm"
            limit = trial.tolerances.gradient if is_norm else trial.tolerances.forward
            found["grad_norm" if is_norm else "loss"].append(
                difference(
                    f"{name} of step {step + 1}", value, theirs[name], allowed=limit * (step + 1)
                )
            )
    return {column: worst(differences) for column, differences in found.items()}


def _load(trial: Trial, name: str) -> Any:
    return torch.load(trial.folder / name, mmap=True, weights_only=True)
