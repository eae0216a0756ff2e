"""What one rank does of a layout: trains the batches, and compares itself with the reference.

The model, its sharding and the step are those of training. The reference writes its first
gradients, its weights and its routing into the folder of the verification; every rank of
another layout reads them there, so that nothing large passes between processes.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from data_pipeline import Batch
from moetrain.model import Transformer
from moetrain.model.router import Router
from moetrain.parallel import plain_name
from moetrain.settings import Resolved
from moetrain.train.build import build_model
from moetrain.train.step import MicroBatch, StepReport, train_step
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
    """Choices of experts, of all steps and layers, that rounding alone decided otherwise."""
    digest: str
    """Of all weights, gathered: equal on every rank, so that replicas are equal to the bit."""


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
    config, rank, world = trial.config, dist.get_rank(), dist.get_world_size()
    model, optimizer, gradients = build_model(
        config, world_size=world, device=CPU, timeout_seconds=trial.timeout_seconds
    )
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
    watch = RoutingWatch(model, trial)
    reports: list[StepReport] = []
    for step in range(trial.num_steps):
        tell(step)
        micro_batches = _share(trial, step, rank=rank, world=world)
        watch.begin(step, micro_batches, first_sequence=_slots(trial, rank, world).start)
        reports.append(
            train_step(
                micro_batches,
                model=model,
                optimizer=optimizer,
                gradients=gradients,
                learning_rate=config.optim.lr,
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
    """Sees each router's choice, and lets near-ties fall as they did in the reference.

    A token whose next experts score alike up to rounding may go to the one in a layout and to the
    other in another. Neither is wrong, but from there on the gradients differ by a token's part
    of them. So where a layout's scores equal the reference's up to rounding, and from those its
    router would choose as the reference did, the reference's choice is taken and counted;
    otherwise the choice stays and shows.
    """

    def __init__(self, model: Transformer, trial: Trial) -> None:
        self.near_ties = 0
        self._trial = trial
        self._tokens_before: dict[int, int] = {}  # a micro-batch's first token, by its address
        self._first_token = 0
        self._seen: list[tuple[Tensor, Tensor]] = []  # scores and choices of this step, by layer
        self._step = 0
        model.register_forward_pre_hook(self._enter)
        for layer, moe in enumerate(model.moe_layers()):
            router: Router = moe.router
            router.select = self._watching(router.select, layer)

    def begin(self, step: int, batches: list[MicroBatch], *, first_sequence: int) -> None:
        """Takes note of which of the global batch's tokens stand in which micro-batch."""
        self._step, self._seen = step, []
        token = first_sequence * self._trial.config.train.seq_len
        for batch in batches:
            self._tokens_before[batch.tokens.data_ptr()] = token
            token += batch.tokens.numel()
        if not self._trial.is_reference:
            self._seen = _load(self._trial, f"routing_{step}.pt")

    def end(self) -> None:
        """Writes the reference's choices down."""
        self._tokens_before.clear()
        if self._trial.is_reference:
            torch.save(self._seen, self._trial.folder / f"routing_{self._step}.pt")

    def _enter(self, _: Any, arguments: tuple[Tensor, ...]) -> None:
        self._first_token = self._tokens_before[arguments[0].data_ptr()]

    def _watching(
        self, select: Callable[[Tensor], Tensor], layer: int
    ) -> Callable[[Tensor], Tensor]:
        def watched(scores: Tensor) -> Tensor:  # [tokens, experts] to [tokens, top_k]
            chosen = select(scores)
            if self._trial.is_reference:
                self._seen.append((scores.detach().clone(), chosen.clone()))
                return chosen
            rows = slice(self._first_token, self._first_token + len(scores))
            their_scores, theirs = (t[rows] for t in self._seen[layer])
            differs = (chosen.sort(-1).values != theirs.sort(-1).values).any(-1)
            apart = (scores - their_scores).abs().amax(-1)
            allowed = self._trial.tolerances.forward * (self._step + 1)
            # The rule must be the same one: given the reference's scores, it makes its choice.
            again = select(their_scores)
            alike = (again.sort(-1).values == theirs.sort(-1).values).all(-1)
            near = differs & alike & (apart <= allowed * their_scores.abs().amax(-1))
            self.near_ties += int(near.sum())
            return torch.where(near.unsqueeze(-1), theirs, chosen)

        return watched


def _slots(trial: Trial, rank: int, world: int) -> range:
    """Returns the sequences of a global batch that a rank takes."""
    share = trial.config.train.global_batch_size // world
    return range(rank * share, (rank + 1) * share)


def _share(trial: Trial, step: int, *, rank: int, world: int) -> list[MicroBatch]:
    slots = _slots(trial, rank, world)
    with np.load(trial.folder / f"batch_{step}.npz") as whole:
        batch = Batch(**{name: whole[name][slots.start : slots.stop] for name in whole.files})
    size = trial.config.train.micro_batch_size or len(slots)
    masked = trial.config.data.mask_documents
    return MicroBatch.cut(batch, size, device=CPU, mask_documents=masked)


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
